"""What the loop and the set-up of a run need from a loader, whatever its batches hold."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Protocol, TypeVar

B_co = TypeVar("B_co", covariant=True)


class DataSpec(Protocol):
    """What to load and how: `LoaderSpec`, `DenseSpec`."""

    @property
    def batch_size(self) -> int:
        """Source images per step and process."""

    @property
    def view_count(self) -> int:
        """Network inputs per source image."""

    @property
    def drop_last(self) -> bool:
        """Whether every batch is full of samples, without padding."""

    @property
    def seed(self) -> int:
        """Decides order and augmentation."""

    def scalars(self, epoch: int, /) -> Mapping[str, float]:
        """What the log shows beside the losses of an epoch."""

    def fingerprint_fields(self) -> Mapping[str, object]:
        """Plain data: all that decides which pixels come in which order, but for the data."""


class TrainingLoader(Protocol[B_co]):
    """Batches of a data set: `Loader`, `DenseLoader`."""

    digest: int
    """Sum over all valid samples served of the hash of what was cut out of them, modulo 2**64."""
    wait_seconds: float
    """Time that consumers have spent waiting, over all epochs."""
    engine: str
    """Who decodes."""
    data_id: str
    """Short hash that identifies the data set."""

    @property
    def spec(self) -> DataSpec:
        """What it was opened with."""

    def __len__(self) -> int:
        """Steps per epoch, the same on every rank."""

    def epoch(self, epoch: int, *, start_step: int = 0) -> Generator[B_co, None, None]:
        """The batches of an epoch, from a step on: a pure function of both."""
