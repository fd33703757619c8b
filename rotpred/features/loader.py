"""`FeatureLoader`: batches of cached features in place of images, to train without the backbone.

Rows are read in shuffled order when their batch is due: from the page cache if the files fit there,
else from disk in every epoch (`in1k_mhead`: 226 GB as float32). Order, batches, masks and resuming
are those of images (`pipelines.sampling.order`). There is no augmentation: a sample has the same
features in every epoch.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.profiler import record_function

from pipelines.arrays import Bool, Int64
from pipelines.batch import IGNORE, Batch
from pipelines.sampling.order import Order
from pipelines.sampling.random_bits import digest64
from pipelines.spec import LoaderSpec
from rotpred.distributed import Rank
from rotpred.features.base import Features


class FeatureLoader:
    """Loader of batches whose images are features: float32 (B, D), stages side by side.

    Implements `rotpred.training.loader_interface.LabelledLoader`.
    """

    engine = "features"

    def __init__(
        self, features: Features, spec: LoaderSpec, *, names: Sequence[str], rank: Rank
    ) -> None:
        """
        Args:
            features: Features of every sample that the spec selects.
            spec: As for the extraction, except batch size, shuffle and drop_last.
            names: Stages, in the order of their columns.
            rank: This process; it gets its shard of each global batch.
        """
        self.spec, self.classes, self.data_id = spec, features.classes, features.data_id
        self.label_range = int(features.labels.min()), int(features.labels.max())
        self.wait_seconds, self.digest = 0.0, 0
        self._features, self._device = features, rank.device
        self._stages = [features.stages[name] for name in names]
        # The features are already those of the selected samples: select all of them.
        every = replace(spec, max_samples=None, samples_per_class=None)
        self._order = Order(len(features.labels), every, rank.shard)

    def __len__(self) -> int:
        """Steps per epoch, the same on every rank."""
        return self._order.steps

    def epoch(self, epoch: int, *, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of an epoch, starting at a step; see `pipelines.loader.Loader.epoch`.

        There are no crops: the digest counts boxes of zeros.
        """
        for rows, valid in zip(*self._order.batches(epoch, start_step), strict=True):
            begin = time.perf_counter()
            with record_function("data wait"):
                parts = [np.asarray(stage[rows], np.float32) for stage in self._stages]
                values = torch.from_numpy(np.concatenate(parts, axis=1))
            self.wait_seconds += time.perf_counter() - begin
            indices = self._features.indices[rows]
            boxes = np.zeros((int(valid.sum()), 5), np.int32)
            batch_digest = digest64(epoch, indices[valid], boxes)
            self.digest = (self.digest + batch_digest) % 2**64
            with record_function("device"):
                batch = self._batch(values, self._features.labels[rows], indices, valid)
            yield batch

    def _batch(self, values: torch.Tensor, labels: Int64, indices: Int64, valid: Bool) -> Batch:
        columns = (torch.from_numpy(column) for column in (labels, indices, valid))
        tensors = [values, *columns]
        if self._device.type == "cuda":
            # From pinned memory the host does not wait for the copy. Torch keeps each block until
            # its copy is done.
            tensors = [
                tensor.pin_memory().to(self._device, non_blocking=True) for tensor in tensors
            ]
        images, classes, places, keep = tensors
        return Batch(images, torch.where(keep, classes, IGNORE), keep, classes, places)
