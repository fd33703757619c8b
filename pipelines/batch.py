"""The contract between loaders and everything above them.

An engine yields `RawBatch`; `pipelines.loader.Loader` turns it into the `Batch` that protocols see.
If an implementation disagrees with the docstrings here, the implementation is wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pipelines.spec import Precision

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

IGNORE = -100
"""Target of a view that must not count: `torch.nn.functional.cross_entropy` ignores this value."""


class Regions(NamedTuple):
    """Cut regions of several sizes, not yet resized (`LoaderSpec.resize="device"`)."""

    pixels: torch.Tensor
    """uint8 (bytes,), RGB: region i is (heights[i], widths[i], 3) from offsets[i] on."""
    offsets: torch.Tensor
    """int64 (B,)."""
    shapes: torch.Tensor
    """int32 (B, 2): heights and widths."""
    flips: torch.Tensor
    """bool (B,): mirror left to right."""
    side: int
    """S: what each is to be resized to."""


class RawBatch(NamedTuple):
    """What an engine yields: decoded crops, before transfer, rotation and normalisation.

    Borrowed: the tensors may be overwritten as soon as the next item is asked for.
    B is `LoaderSpec.batch_size` in every batch of an epoch, the last one included.
    """

    images: torch.Tensor | Regions
    """uint8 (B, S, S, 3), RGB, contiguous, S as `LoaderSpec.side` says; or regions."""
    labels: torch.Tensor
    """int64 (B,): class ids, -1 where the data set has no labels."""
    indices: torch.Tensor
    """int64 (B,): position of each sample in the data set's index."""
    valid: torch.Tensor
    """bool (B,): False for padding and for samples that could not be decoded."""
    boxes: torch.Tensor
    """int32 (B, 5): top, left, height, width of the crop in pixels of the upright image, and 1
    where it was flipped left to right. A box may stick out of the image (padding, black)."""


class Batch(NamedTuple):
    """What protocols train and evaluate on. Owned: the loader never touches it again.

    V is 4 with `views="rotate4"` and 1 with `views="plain"`. Rows are rotation-major: row k*B + i
    is sample i turned by k*90 degrees counter-clockwise, so the first B rows are the plain batch.
    """

    images: torch.Tensor
    """float32, bfloat16 or float16 (V*B, 3, S, S), channels_last, normalised."""
    targets: torch.Tensor
    """int64 (V*B,): rotation k with `rotate4`, class id with `plain`; IGNORE where not `valid`."""
    valid: torch.Tensor
    """bool (V*B,)."""
    labels: torch.Tensor
    """int64 (B,): class ids of the sources, whatever the targets are."""
    indices: torch.Tensor
    """int64 (B,)."""


def check_batch(batch: Batch, *, views: int, batch_size: int, size: int) -> None:
    """Raise `ValueError` where a batch breaks the contract above. Reads shapes and layout only."""
    rows = views * batch_size
    images = batch.images
    if images.shape != (rows, 3, size, size):
        raise ValueError(f"images are {tuple(images.shape)}, expected {(rows, 3, size, size)}")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}, expected a floating point type")
    if not images.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"images are not channels_last: strides {images.stride()}")
    for name, tensor, length, dtype in (
        ("targets", batch.targets, rows, torch.int64),
        ("valid", batch.valid, rows, torch.bool),
        ("labels", batch.labels, batch_size, torch.int64),
        ("indices", batch.indices, batch_size, torch.int64),
    ):
        if tensor.shape != (length,) or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} ({length},)"
            )
        if tensor.device != images.device:
            raise ValueError(f"{name} is on {tensor.device}, images on {images.device}")
