"""What happens to a sample that cannot be decoded: counted, masked, never trained on."""

from __future__ import annotations

import logging

from pipelines.imaging.decode import ImageError

log = logging.getLogger(__name__)


class BadSamples:
    """The budget of undecodable samples per epoch (`LoaderSpec.max_bad`)."""

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
                f"{name}: {reason} ({self._in_epoch} undecodable this epoch, max_bad is "
                f"{self._limit}; raise it, or convert the data anew, which sets them aside)"
            )
        log.warning("masked %s: %s", name, reason)
