"""The contract of `pipelines.batch.Batch`, checked."""

from __future__ import annotations

import torch

from pipelines.batch import Batch


def check_batch(batch: Batch, *, views: int, batch_size: int, size: int) -> None:
    """Check shapes, types, devices and memory layout of a batch. Reads no values.

    Args:
        batch: The batch.
        views: V.
        batch_size: B.
        size: S.

    Raises:
        ValueError: The batch breaks the contract of `Batch`.
    """
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
