"""Engine: random images that are already on the device.

It gives the upper limit of training speed (nothing is read, decoded or sent over the bus), and
smoke runs on a machine without data. Pixels are noise. Labels are drawn once per sample, so that a
probe has something to fit.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch

from pipelines.batch import RawBatch
from pipelines.engines.source import DecodeErrorBudget
from pipelines.sampling.crops import crop_boxes
from pipelines.sampling.order import Order
from pipelines.spec import LoaderSpec, Shard

CLASSES = 10
"""Number of classes of the random labels."""


class SyntheticSource:
    """Random crops: the same pixels in every batch, with the indices and labels of real samples."""

    def __init__(self, spec: LoaderSpec, *, shard: Shard, device: torch.device) -> None:
        self._spec = spec
        self.decode_errors = DecodeErrorBudget(spec.max_undecodable)
        generator = torch.Generator().manual_seed(spec.seed)
        count = spec.batch_size * spec.crop.size**2 * 3
        pixels = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        self._pixels = pixels.to(device)
        self._labels = torch.randint(0, CLASSES, (spec.samples,), generator=generator).numpy()
        self._order = Order(spec.samples, spec, shard, self._labels)

    def __len__(self) -> int:
        return self._order.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[RawBatch, None, None]:
        """See `pipelines.engines.source.Source.epoch`."""
        spec, side = self._spec, self._spec.side(epoch)
        shape = (spec.batch_size, side, side, 3)
        images = self._pixels[: spec.batch_size * side**2 * 3].view(shape)
        # Crop boxes as of images of the largest side: they do not depend on the epoch's side.
        sizes = np.full(spec.batch_size, spec.crop.size, np.int32)
        for indices, valid in zip(*self._order.batches(epoch, start_step), strict=True):
            where = crop_boxes(spec, epoch=epoch, indices=indices, heights=sizes, widths=sizes)
            yield RawBatch.from_arrays(images, self._labels[indices], indices, valid, where)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
