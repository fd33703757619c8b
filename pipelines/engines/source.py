"""The interface of engines, `Source`, and the limit on undecodable samples."""

from __future__ import annotations

import logging
from collections.abc import Generator
from typing import Protocol, runtime_checkable

from pipelines.batch import RawBatch
from pipelines.imaging.decode import ImageError


class Source(Protocol):
    """The interface of an engine: decoded crops of a data set, in batches."""

    decode_errors: DecodeErrorBudget
    """Count and limit of undecodable samples."""

    def __len__(self) -> int:
        """Steps per epoch, the same on every rank."""

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[RawBatch, None, None]:
        """Yield the batches of an epoch, starting at a step: a pure function of both and the spec.

        Each batch is borrowed until the next one is requested. Closing the iterator early releases
        its resources; another epoch may start at once.

        Raises:
            ImageError: More samples are undecodable than the spec allows.
            TimeoutError: There was no batch within the spec's timeout.
        """

    def close(self) -> None:
        """Release threads, buffers and files."""


@runtime_checkable
class Tunable(Source, Protocol):
    """A source whose number of decoding threads can be changed between epochs."""

    workers: int


log = logging.getLogger(__name__)


class DecodeErrorBudget:
    """Counts undecodable samples against a limit per epoch (`LoaderSpec.max_undecodable`)."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.paused = False
        """Whether to ignore reports: those of trials, whose samples the epoch reports again."""
        self.total = 0
        """Count over the lifetime of the source."""
        self._in_epoch = 0

    def start_epoch(self) -> None:
        """Reset the count of the epoch."""
        self._in_epoch = 0

    def report(self, name: str, reason: str) -> None:
        """Count one undecodable sample, and log it.

        Args:
            name: Name of the sample for messages.
            reason: Why it cannot be decoded.

        Raises:
            ImageError: The limit of this epoch is exceeded.
        """
        if self.paused:
            return
        self.total += 1
        self._in_epoch += 1
        if self._in_epoch > self._limit:
            raise ImageError(
                f"{name}: {reason} ({self._in_epoch} undecodable this epoch, max_undecodable is "
                f"{self._limit}; raise it, or convert the data again, which leaves them out)"
            )
        log.warning("masked %s: %s", name, reason)
