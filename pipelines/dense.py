"""Batches for detection and segmentation."""

from __future__ import annotations

from collections.abc import Generator

import torch

from pipelines.annotations import DenseSamples
from pipelines.dense_spec import DenseBatch, DenseSpec
from pipelines.spec import Precision, Shard


class DenseLoader:
    """Contract: see rotpred.feed.Feed."""

    spec: DenseSpec
    samples: DenseSamples
    classes: tuple[str, ...]
    data_id: str
    engine: str
    wait_seconds: float
    digest: int

    def __len__(self) -> int:
        """Steps per epoch, the same on every rank."""
        raise NotImplementedError

    def epoch(self, epoch: int, *, start_step: int = 0) -> Generator[DenseBatch, None, None]:
        """The batches of an epoch, from a step on."""
        raise NotImplementedError

    def close(self) -> None:
        """End the threads."""

    def __enter__(self) -> DenseLoader:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def open_dense(
    spec: DenseSpec,
    *,
    shard: Shard | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
) -> DenseLoader:
    """Open the data set that a spec names."""
    raise NotImplementedError
