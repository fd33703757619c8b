"""Batches of features that lie on disk, in place of images: classifiers without the backbone's work.

Rows are read when their batch is due, in shuffled order: from memory where the system can keep the
files there, else from the disk in every epoch (`in1k_mhead`: 226 GB as float32). Order, batches,
masks and resuming are those of images (`pipelines.sampling.order`); what is lost is the augmentation,
because a sample has the same features in every epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from pipelines.arrays import Int64
from pipelines.batch import IGNORE, Batch, RawBatch
from pipelines.engines.source import DecodeErrors
from pipelines.loader import Loader
from pipelines.sampling.order import Order
from pipelines.spec import LoaderSpec, Shard
from rotpred.distributed import Rank
from rotpred.features.base import Features


class _Rows:
    """The rows of several stages side by side, as the bytes that the loader sends to the device."""

    def __init__(self, features: Features, names: Sequence[str], order: Order) -> None:
        self.bad = DecodeErrors(0)
        self._features, self._names, self._order = features, names, order

    def __len__(self) -> int:
        return self._order.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        features = self._features
        for rows, valid in zip(*self._order.batches(epoch, start_step), strict=True):
            parts = [np.asarray(features.stages[name][rows], np.float32) for name in self._names]
            values = torch.from_numpy(np.concatenate(parts, axis=1))
            yield RawBatch(
                values.view(torch.uint8),
                torch.from_numpy(features.labels[rows]),
                torch.from_numpy(features.indices[rows]),
                torch.from_numpy(valid),
                torch.zeros(len(rows), 5, dtype=torch.int32),
            )

    def close(self) -> None:
        """Nothing to release."""


class FeatureLoader(Loader):
    """A loader whose images are features: float32 (B, D), the stages side by side."""

    def __init__(
        self, features: Features, spec: LoaderSpec, *, names: Sequence[str], rank: Rank
    ) -> None:
        """Serve extracted features.

        Args:
            features: of every sample that the spec asks for.
            spec: what they were extracted with; batch size, shuffling and drop_last are free.
            names: stages, in the order in which they lie side by side.
            rank: takes its part of each global batch.
        """
        # The features are those of the chosen samples already: none are drawn again.
        all_of_them = replace(spec, max_samples=None, samples_per_class=None)
        order = Order(len(features.labels), all_of_them, Shard(rank.rank, rank.world))
        super().__init__(
            _Rows(features, names, order),
            spec,
            engine="features",
            device=rank.device,
            classes=features.classes,
            data_id=features.data_id,
            label_range=(int(features.labels.min()), int(features.labels.max())),
            total=len(features.labels),
        )

    def _finish(self, raw: RawBatch, epoch: int, indices: Int64) -> Batch:  # noqa: ARG002
        assert isinstance(raw.images, torch.Tensor)
        # A copy: the buffer of bytes is overwritten by a later batch.
        values = raw.images.view(torch.float32).clone()
        targets = torch.where(raw.valid, raw.labels, IGNORE)
        return Batch(values, targets, raw.valid, raw.labels, raw.indices)
