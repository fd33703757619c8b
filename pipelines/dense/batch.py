"""Batches of images of variable size, with boxes or masks."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch


class Target(TypedDict, total=False):
    """Ground truth of an image, in pixels of the resized image. Keys as in torchvision."""

    boxes: torch.Tensor
    """float32 (K, 4): left, top, right, bottom; right and bottom are exclusive."""
    labels: torch.Tensor
    """int64 (K,): 1 + index into the classes; 0 is the background."""
    masks: torch.Tensor
    """uint8 (K, h, w), 0 or 1, of the size of the image without padding. Present if the data set
    has masks of objects and the spec requests them."""


class DenseBatch(NamedTuple):
    """A batch of a dense loader. The consumer owns the tensors."""

    images: torch.Tensor
    """float32, bfloat16 or float16 (B, 3, H, W), channels_last, normalised, on the device. Each
    image is at the top left; the padding to its right and below is 0, the mean color."""
    sizes: torch.Tensor
    """int64 (B, 2), on the CPU: height and width of each resized image, without padding."""
    originals: torch.Tensor
    """int64 (B, 2), on the CPU: height and width of each stored image, upright."""
    indices: torch.Tensor
    """int64 (B,), on the CPU: positions of the samples in the data set."""
    valid: torch.Tensor
    """bool (B,), on the CPU: False for padding, which occurs in evaluation only."""
    targets: list[Target]
    """B targets, on the device, for training on detection data; otherwise empty."""
    masks: torch.Tensor | None
    """int64 (B, H, W), on the device: class ids, `IGNORED` for pixels that do not count. For
    training on segmentation data; otherwise None."""
