"""Protocols of loaders and their specs, as the training loop and the protocols need them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Protocol, TypeVar

from pipelines.batch import Batch
from pipelines.spec import LoaderSpec

B_co = TypeVar("B_co", covariant=True)


class DataSpec(Protocol):
    """Spec of a loader: `LoaderSpec` or `DenseSpec`."""

    @property
    def batch_size(self) -> int:
        """Source images per step and process."""

    @property
    def view_count(self) -> int:
        """Network inputs per source image."""

    @property
    def drop_last(self) -> bool:
        """Whether an incomplete last batch is dropped instead of padded."""

    @property
    def seed(self) -> int:
        """Seed of order and augmentation."""

    def scalars(self, epoch: int, /) -> Mapping[str, float]:
        """Return values to log beside the losses of an epoch."""

    def fingerprint_fields(self) -> Mapping[str, object]:
        """Return, as JSON values, all that determines pixels and order, except the data set."""


class TrainingLoader(Protocol[B_co]):
    """Loader of training batches: `Loader`, `DenseLoader` or `FeatureLoader`."""

    digest: int
    """Sum of the hashes of all valid samples served and their crop boxes, modulo 2**64."""
    wait_seconds: float
    """Seconds that consumers have waited for batches, over all epochs."""
    engine: str
    """Name of the engine that decodes."""
    data_id: str
    """Short hash that identifies the data set."""

    @property
    def spec(self) -> DataSpec:
        """The spec that the loader was opened with."""

    def __len__(self) -> int:
        """Return the steps per epoch, the same on every rank."""

    def epoch(self, epoch: int, *, start_step: int = 0) -> Generator[B_co, None, None]:
        """Yield the batches of an epoch from `start_step` on: a pure function of both."""


class LabelledLoader(TrainingLoader[Batch], Protocol):
    """Loader of images with class labels, or of their features: `Loader` or `FeatureLoader`."""

    classes: tuple[str, ...]
    """Class names; empty if the data set has none."""
    label_range: tuple[int, int]
    """Smallest and largest label of the data set; -1 means no label."""

    @property
    def spec(self) -> LoaderSpec:
        """The spec that the loader was opened with."""
