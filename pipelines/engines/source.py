"""`Source`, the interface of every engine, and its limit on undecodable samples."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Protocol

from pipelines.batch import RawBatch
from pipelines.imaging.decode import ImageError


class Source(Protocol):
    """What an engine implements."""

    bad: DecodeErrors
    """Undecodable samples met so far."""

    def __len__(self) -> int:
        """Steps per epoch, the same on every rank."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        """The batches of an epoch from a step on: a pure function of both, and of the spec.

        Each item is borrowed until the next one is asked for. Closing the iterator early releases
        what it holds; a second epoch may follow at once.
        """

    def close(self) -> None:
        """Release threads, buffers and files."""


log = logging.getLogger(__name__)


class DecodeErrors:
    """The budget of undecodable samples per epoch (`LoaderSpec.max_undecodable`)."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.total = 0
        """Over the life of the source."""
        self._in_epoch = 0

    def start_epoch(self) -> None:
        self._in_epoch = 0

    def report(self, name: str, reason: str) -> None:
        """Count one sample.

        Raises:
            ImageError: the budget of this epoch is spent.
        """
        self.total += 1
        self._in_epoch += 1
        if self._in_epoch > self._limit:
            raise ImageError(
                f"{name}: {reason} ({self._in_epoch} undecodable this epoch, max_undecodable is "
                f"{self._limit}; raise it, or convert the data anew, which sets them aside)"
            )
        log.warning("masked %s: %s", name, reason)
