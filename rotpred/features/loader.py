"""`FeatureLoader`: batches of cached features in place of images, to train without the backbone.

Rows are read in shuffled order when their batch is due: from the page cache if the files fit there,
else from disk in every epoch (`in1k_mhead`: 226 GB as float32). Order, batches, masks and resuming
are those of images (`pipelines.sampling.order`). There is no augmentation: a sample has the same
features in every epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from pipelines.arrays import Int64
from pipelines.batch import IGNORE, Batch, RawBatch
from pipelines.engines.source import DecodeErrorBudget
from pipelines.loader import Loader
from pipelines.sampling.order import Order
from pipelines.spec import LoaderSpec, Shard
from rotpred.distributed import Rank
from rotpred.features.base import Features


class _Rows:
    """Data source: rows of several stages side by side, as uint8 (B, 4*D) for the transfer."""

    def __init__(self, features: Features, names: Sequence[str], order: Order) -> None:
        self.decode_errors = DecodeErrorBudget(0)
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
    """Loader whose images are features: float32 (B, D), stages side by side."""

    def __init__(
        self, features: Features, spec: LoaderSpec, *, names: Sequence[str], rank: Rank
    ) -> None:
        """Open a loader over extracted features.

        Args:
            features: Features of every sample that the spec selects.
            spec: As for the extraction, except batch size, shuffle and drop_last.
            names: Stages, in the order of their columns.
            rank: This process; it gets its shard of each global batch.
        """
        # The features are already those of the selected samples: select all of them.
        all_samples = replace(spec, max_samples=None, samples_per_class=None)
        order = Order(len(features.labels), all_samples, Shard(rank.rank, rank.world))
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
        # A copy: a later batch overwrites the buffer.
        values = raw.images.view(torch.float32).clone()
        targets = torch.where(raw.valid, raw.labels, IGNORE)
        return Batch(values, targets, raw.valid, raw.labels, raw.indices)
