"""Transforms of an image together with its boxes or masks, on torchvision's kernels.

Every parameter comes from uniform draws of the sample (`augment.uniforms`), so a sample in a pass
over the data looks the same on any rank, in any thread, after any resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.arrays import Float64, Int64
from pipelines.datasets.annotations import IGNORED
from pipelines.dense.spec import DenseSpec, FitWithin, RatioCrop, ShortSide
from pipelines.sampling.random_bits import uniforms

_TRIES = 11  # a crop, and ten more: mmseg/datasets/transforms/transforms.py, RandomCrop
_FLIP, _SCALE, _TINT, _CORNER = 0, 1, 2, 11  # first draw of each use
_STREAM, _COUNT = 0xDE45E, _CORNER + 2 * _TRIES

_BRIGHTNESS, _LOW, _HIGH = 32.0, 0.5, 1.5
_HUE = 18 / 180  # of the circle: OpenCV counts the hue of uint8 pixels in steps of two degrees


class ResizePlan(NamedTuple):
    """What is done to an image, as far as its size alone decides."""

    height: int
    """Of the resized image, in pixels."""
    width: int
    flip: bool
    size: tuple[int, int]
    """Height and width of what comes out: of the crop, or of the resized image."""


@dataclass
class Scene:
    """An image and what is to be transformed with it; K objects."""

    image: tv_tensors.Image
    """uint8 (3, H, W)."""
    boxes: tv_tensors.BoundingBoxes | None = None
    """float32 (K, 4), XYXY."""
    masks: tv_tensors.Mask | None = None
    """uint8 (K, H, W) of objects, or (1, H, W) of classes."""


def draws(spec: DenseSpec, passes: Int64, indices: Int64) -> Float64:
    """The random numbers of some samples, float64 (B, count)."""
    rows = [
        uniforms(spec.seed, int(number), indices[i : i + 1], stream=_STREAM, count=_COUNT)
        for i, number in enumerate(passes)
    ]
    return np.concatenate(rows)


def within(height: int, width: int, *, long: float, short: float) -> tuple[int, int]:
    """Height and width of the largest image of the same ratio within a frame.

    As mmcv (mmcv/image/geometric.py, rescale_size) and, to a pixel in rare ties, detectron2's
    ResizeShortestEdge: both sides are scaled alike and halves are rounded up.
    """
    scale = min(long / max(height, width), short / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def place(spec: DenseSpec, draw: Float64, height: int, width: int) -> ResizePlan:
    """What becomes of a stored image of this size.

    Args:
        spec: geometry, flip and train are read; in evaluation nothing is random.
        draw: float64 (count,), of the sample.
        height: of the upright image.
        width: as height.
    """
    flip = spec.train and spec.flip and bool(draw[_FLIP] < 0.5)
    match spec.geometry:
        case ShortSide(lengths, longest):
            chosen = lengths[int(draw[_SCALE] * len(lengths))]
            size = within(height, width, long=longest, short=chosen)
            return ResizePlan(*size, flip, size)
        case FitWithin(long, short):
            size = within(height, width, long=long, short=short)
            return ResizePlan(*size, flip, size)
        case RatioCrop() as crop:
            low, high = crop.ratio
            ratio = low + (high - low) * float(draw[_SCALE])
            size = within(height, width, long=int(crop.long * ratio), short=int(crop.short * ratio))
            return ResizePlan(*size, flip, (min(size[0], crop.size), min(size[1], crop.size)))


def resized(scene: Scene, place: ResizePlan) -> Scene:
    """Resize, then flip.

    Images by the antialiased bilinear filter (as Pillow's, which detectron2 uses), masks to the
    nearest pixel, by centres, so that they stay aligned with the images.
    """
    size = [place.height, place.width]
    image = scene.image
    if image.shape[1:] != torch.Size(size):
        image = F.resize(image, size, antialias=True)
    boxes, masks = scene.boxes, scene.masks
    if boxes is not None:
        boxes = F.resize(boxes, size)
    if masks is not None and masks.shape[1:] != torch.Size(size):
        # As an image: resize of a Mask takes any interpolation for NEAREST in some versions.
        pixels = F.resize(
            masks.as_subclass(torch.Tensor), size, interpolation=InterpolationMode.NEAREST_EXACT
        )
        masks = tv_tensors.Mask(pixels)
    if place.flip:
        image = F.horizontal_flip(image)
        boxes = None if boxes is None else F.horizontal_flip(boxes)
        masks = None if masks is None else F.horizontal_flip(masks)
    return Scene(image, boxes, masks)


def corner(mask: npt.NDArray[np.uint8], crop: RatioCrop, draw: Float64) -> tuple[int, int]:
    """Where to cut: the first place drawn of which no class has too much, else the last one.

    As mmsegmentation's RandomCrop, a place of one class alone, or where no pixel counts, has too
    much.

    Args:
        mask: uint8 (h, w), of the resized image.
        crop: size and share.
        draw: float64 (count,), of the sample.

    Returns:
        Top and left in pixels.
    """
    room = (max(mask.shape[0] - crop.size, 0), max(mask.shape[1] - crop.size, 0))
    top = left = 0
    for i in range(_TRIES):
        down, right = draw[_CORNER + 2 * i : _CORNER + 2 * i + 2]
        top, left = int(down * (room[0] + 1)), int(right * (room[1] + 1))
        if i == _TRIES - 1 or room == (0, 0):
            break
        counts = np.bincount(
            mask[top : top + crop.size, left : left + crop.size].reshape(-1), minlength=IGNORED + 1
        )[:IGNORED]
        if 0 < counts.max() <= crop.most * counts.sum() and np.count_nonzero(counts) > 1:
            break
    return top, left


def cut(scene: Scene, top: int, left: int, side: int) -> Scene:
    """A square of an image with its mask, less what lies outside of it."""
    height = min(side, scene.image.shape[1] - top)
    width = min(side, scene.image.shape[2] - left)
    masks = scene.masks
    return Scene(
        F.crop(scene.image, top, left, height, width),
        None,
        None if masks is None else F.crop(masks, top, left, height, width),
    )


def distort(image: torch.Tensor, draw: Sequence[float] | Float64) -> torch.Tensor:
    """Random brightness, contrast, saturation and hue, each with probability one half.

    mmsegmentation's PhotoMetricDistortion (mmseg/datasets/transforms/transforms.py), after SSD (Liu
    et al., ECCV 2016): brightness adds up to 32 of 255; contrast multiplies by 0.5 to 1.5, before
    or after the next two; saturation and hue of the HSV model are multiplied by 0.5 to 1.5 and
    turned by up to a tenth of the circle. Values are cut off at 0 and 255 after each, and rounded
    once, at the end.

    Args:
        image: uint8 (3, H, W).
        draw: (count,), of the sample.

    Returns:
        uint8 (3, H, W).
    """
    brighter, delta, late, contrast, factor, saturate, more, hue, turn = (
        float(v) for v in draw[_TINT:_CORNER]
    )
    x = image.contiguous().float()  # channel by channel, in which hue takes two thirds of the time
    scale = _LOW + (_HIGH - _LOW) * factor
    if brighter < 0.5:
        x = (x + _BRIGHTNESS * (2 * delta - 1)).clamp_(0, 255)
    if contrast < 0.5 and late < 0.5:
        x = (x * scale).clamp_(0, 255)
    if saturate < 0.5:
        x = _saturate(x, _LOW + (_HIGH - _LOW) * more)
    if hue < 0.5:
        x = F.adjust_hue(x.div_(255), _HUE * (2 * turn - 1)).mul_(255)
    if contrast < 0.5 and late >= 0.5:
        x = (x * scale).clamp_(0, 255)
    return x.round_().to(torch.uint8)


def _saturate(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply HSV's saturation, at most to 1: hue and value stay, so the distance of each channel
    from the largest one grows by the factor."""
    value = x.amax(0, keepdim=True)
    span = value - x.amin(0, keepdim=True)
    if factor <= 1:
        return value - (value - x) * factor
    most = value / span.clamp_(min=1e-6)  # grey has no span, and stays grey by any factor
    return value - (value - x) * most.clamp_(max=factor)
