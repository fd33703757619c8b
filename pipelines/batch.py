"""Batch types: the contract between engines, the loader and the training code.

An engine yields `RawBatch`. `pipelines.loader.Loader` turns it into `Batch`. If an implementation
disagrees with the docstrings here, the implementation is wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pipelines.arrays import Bool, Int32, Int64
from pipelines.spec import Precision

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Type of the images of a batch, by precision."""

IGNORE = -100
"""Target of views that do not count: `torch.nn.functional.cross_entropy` ignores it."""


class Regions(NamedTuple):
    """Crops of different sizes, before the resize (`LoaderSpec.resize="device"`)."""

    pixels: torch.Tensor
    """uint8 (bytes,), RGB: crop i starts at offsets[i] and is (heights[i], widths[i], 3)."""
    offsets: torch.Tensor
    """int64 (B,): start of each crop in `pixels`."""
    shapes: torch.Tensor
    """int32 (B, 2): height and width of each crop."""
    flips: torch.Tensor
    """bool (B,): whether to flip it horizontally."""
    side: int
    """S: side after the resize, in pixels."""


class RawBatch(NamedTuple):
    """A batch of an engine: decoded crops, before transfer, rotation and normalisation.

    The tensors are borrowed: the engine may overwrite them when the next batch is requested.
    B is `LoaderSpec.batch_size` in every batch, including the last one of an epoch.
    """

    images: torch.Tensor | Regions
    """uint8 (B, S, S, 3), RGB, contiguous, with S = `LoaderSpec.side(epoch)`; or `Regions`."""
    labels: torch.Tensor
    """int64 (B,): class ids, -1 where the data set has no labels."""
    indices: torch.Tensor
    """int64 (B,): position of each sample in the data set's index."""
    valid: torch.Tensor
    """bool (B,): False for padding and for samples that could not be decoded."""
    boxes: torch.Tensor
    """int32 (B, 5): crop boxes, as `pipelines.sampling.crops.crop_boxes` returns them. The part of
    a box outside the image is black."""

    @classmethod
    def from_arrays(
        cls,
        images: torch.Tensor | Regions,
        labels: Int64,
        indices: Int64,
        valid: Bool,
        boxes: Int32,
    ) -> RawBatch:
        """Return a batch that shares the memory of the arrays."""
        return cls(images, *map(torch.from_numpy, (labels, indices, valid, boxes)))


class Batch(NamedTuple):
    """A batch of a loader: normalised views on the device.

    The consumer owns the tensors: the loader never writes to them again. V is 4 with
    `views="rotate4"` and 1 with `views="plain"`. Rows are rotation-major: row k*B + i is sample i,
    rotated by k*90 degrees counter-clockwise. The first B rows are the unrotated batch.
    """

    images: torch.Tensor
    """float32, bfloat16 or float16 (V*B, 3, S, S), channels_last, normalised."""
    targets: torch.Tensor
    """int64 (V*B,): rotation k with `rotate4`, class id with `plain`. IGNORE where not `valid`."""
    valid: torch.Tensor
    """bool (V*B,): False for padding and for samples that could not be decoded."""
    labels: torch.Tensor
    """int64 (B,): class ids, also with `rotate4`; -1 where the data set has no labels."""
    indices: torch.Tensor
    """int64 (B,): position of each sample in the data set's index."""
