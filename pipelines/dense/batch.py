"""Batches of images of variable size, with boxes or masks."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch


class Target(TypedDict, total=False):
    """What is to be found in an image, in pixels of the resized one. torchvision's names."""

    boxes: torch.Tensor
    """float32 (K, 4): left, top, right, bottom; right and bottom lie behind the last pixel."""
    labels: torch.Tensor
    """int64 (K,): 1 + position among the classes; 0 is the background."""
    masks: torch.Tensor
    """uint8 (K, h, w), 0 or 1, in the size of the image without padding; where the data have
    masks of objects and the spec wants them."""


class DenseBatch(NamedTuple):
    """Owned by the consumer."""

    images: torch.Tensor
    """float32, bfloat16 or float16 (B, 3, H, W), channels_last, normalised, on the device. Each
    image lies at the top left; what is beside and below it is 0, the mean color."""
    sizes: torch.Tensor
    """int64 (B, 2), on the CPU: height and width of each resized image, without padding."""
    originals: torch.Tensor
    """int64 (B, 2), on the CPU: height and width of each image as it is stored, upright."""
    indices: torch.Tensor
    """int64 (B,), on the CPU: positions in the data set."""
    valid: torch.Tensor
    """bool (B,), on the CPU: False for padding, in evaluation only."""
    targets: list[Target]
    """B, on the device; of detection data in training, else empty."""
    masks: torch.Tensor | None
    """int64 (B, H, W), on the device: classes, `IGNORED` where no pixel counts; of segmentation
    data in training, else None."""
