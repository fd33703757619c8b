"""Progress bars."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

from rotpred.records.console import duration

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_EVERY_SECONDS = 60.0
"""Seconds without a log line after which `Progress` writes one."""


class Progress:
    """A progress bar on a terminal (standard error); elsewhere a log line after a silent minute.

    Batch systems write output to files, where a bar is noise and silence looks like a hang.
    """

    def __init__(self, what: str, total: int, *, start: int = 0) -> None:
        """Start the clock, and the bar on a terminal.

        Args:
            what: Name of the work.
            total: Number of steps.
            start: Steps that were done earlier.
        """
        self._what, self._total, self._start = what, total, start
        self._began = self._logged = time.monotonic()
        self._bar: tqdm | None = None
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm  # an import that most jobs do not need

            self._bar = tqdm(
                desc=what, total=total, initial=start, unit="step", dynamic_ncols=True, leave=False
            )

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def update(self, done: int) -> None:
        """Show that `done` steps are done. Cheap enough for every step."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._logged < LOG_EVERY_SECONDS or not self._start < done < self._total:
            return
        left = (now - self._began) / (done - self._start) * (self._total - done)
        text = f"{done:,} of {self._total:,} steps, {duration(left)} left"
        logger.info("%s: %s", self._what, text)
        self._logged = now

    def mark_logged(self) -> None:
        """Restart the minute: the caller has logged the progress itself."""
        self._logged = time.monotonic()
