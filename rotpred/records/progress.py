"""How far long work is."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rotpred.records.console import duration

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

EVERY = 60.0
"""Seconds without a word after which a log file gets a line."""


class Progress:
    """A bar where standard error is a terminal; elsewhere a line, whenever none came for a minute.

    Batch systems keep output in files, where a bar would be noise and silence looks like a hang.
    """

    def __init__(
        self, what: str, total: int, *, start: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Show nothing yet.

        Args:
            what: is being done.
            total: steps.
            start: steps that were done before.
            clock: seconds.
        """
        self._what, self._total, self._start, self._clock = what, total, start, clock
        self._began = self._said = clock()
        self._bar: tqdm | None = None
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm  # an import that most jobs do not need

            self._bar = tqdm(
                desc=what, total=total, initial=start, unit="step", dynamic_ncols=True, leave=False
            )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def update(self, done: int) -> None:
        """Tell that `done` steps are done. Cheap enough for every step."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            return
        now = self._clock()
        if now - self._said < EVERY or not self._start < done < self._total:
            return
        left = (now - self._began) / (done - self._start) * (self._total - done)
        words = f"{done:,} of {self._total:,} steps, {duration(left)} left"
        logger.info("%s: %s", self._what, words)
        self._said = now

    def said(self) -> None:
        """Tell that somebody else said how far it is."""
        self._said = self._clock()
