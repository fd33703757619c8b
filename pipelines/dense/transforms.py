"""Transforms of an image together with its boxes or masks, on torchvision's kernels.

All parameters come from uniform draws per sample (`pipelines.sampling.random_bits.uniforms`), so a
sample in a pass over the data is the same on any rank, in any thread, after any resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.arrays import Float64, Int64, Uint8
from pipelines.datasets.annotations import IGNORED
from pipelines.dense.spec import DenseSpec, FitWithin, RatioCrop, ShortSide
from pipelines.sampling.random_bits import uniforms

_TRIES = 11  # one crop and ten retries: mmseg/datasets/transforms/transforms.py, RandomCrop
_FLIP, _SCALE, _COLOR, _CORNER = 0, 1, 2, 11  # index of the first draw for each use
_STREAM, _COUNT = 0xDE45E, _CORNER + 2 * _TRIES

_BRIGHTNESS, _LOW, _HIGH = 32.0, 0.5, 1.5
_HUE = 18 / 180  # of the circle: OpenCV counts the hue of uint8 pixels in steps of two degrees


class ResizePlan(NamedTuple):
    """Resize, flip and output size of an image: all that follows from its size and its draws."""

    height: int
    """Height of the resized image, in pixels."""
    width: int
    """Width of the resized image, in pixels."""
    flip: bool
    """Whether to flip it horizontally."""
    size: tuple[int, int]
    """Height and width of the output: of the crop, or of the resized image."""


@dataclass
class Scene:
    """An image, and the boxes and masks of its K objects."""

    image: tv_tensors.Image
    """uint8 (3, H, W)."""
    boxes: tv_tensors.BoundingBoxes | None = None
    """float32 (K, 4), XYXY."""
    masks: tv_tensors.Mask | None = None
    """uint8 (K, H, W) of objects, or (1, H, W) of classes."""


def draw_uniforms(spec: DenseSpec, passes: Int64, indices: Int64) -> Float64:
    """Return the random numbers of samples.

    Args:
        spec: Gives the seed.
        passes: int64 (B,), number of the pass over the data.
        indices: int64 (B,), positions in the data set.

    Returns:
        float64 (B, count), uniform in [0, 1).
    """
    rows = [
        uniforms(spec.seed, int(number), indices[i : i + 1], stream=_STREAM, count=_COUNT)
        for i, number in enumerate(passes)
    ]
    return np.concatenate(rows)


def fit_within(height: int, width: int, *, long: float, short: float) -> tuple[int, int]:
    """Return height and width of the largest image of the same aspect ratio within a frame.

    Both sides are scaled by the same factor, and halves are rounded up, as in mmcv
    (mmcv/image/geometric.py, rescale_size). detectron2's ResizeShortestEdge differs by a pixel in
    rare ties.
    """
    scale = min(long / max(height, width), short / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def plan_resize(spec: DenseSpec, draw: Float64, height: int, width: int) -> ResizePlan:
    """Plan resize, flip and output size of an image.

    Args:
        spec: Gives geometry, flip and train. In evaluation images are not flipped.
        draw: float64 (count,), random numbers of the sample.
        height: Height of the upright image.
        width: Width of the upright image.
    """
    flip = spec.train and spec.flip and bool(draw[_FLIP] < 0.5)
    match spec.geometry:
        case ShortSide(lengths, longest):
            chosen = lengths[int(draw[_SCALE] * len(lengths))]
            size = fit_within(height, width, long=longest, short=chosen)
            return ResizePlan(*size, flip, size)
        case FitWithin(long, short):
            size = fit_within(height, width, long=long, short=short)
            return ResizePlan(*size, flip, size)
        case RatioCrop() as crop:
            low, high = crop.ratio
            ratio = low + (high - low) * float(draw[_SCALE])
            size = fit_within(
                height, width, long=int(crop.long * ratio), short=int(crop.short * ratio)
            )
            return ResizePlan(*size, flip, (min(size[0], crop.size), min(size[1], crop.size)))


def resize_scene(scene: Scene, plan: ResizePlan) -> Scene:
    """Resize, then flip.

    Images are resized with an antialiased bilinear filter, like Pillow's, which detectron2 uses.
    Masks take the nearest pixel, by pixel centres, so that they remain aligned with the images.
    """
    size = [plan.height, plan.width]
    image = scene.image
    if image.shape[1:] != torch.Size(size):
        image = F.resize(image, size, antialias=True)
    boxes, masks = scene.boxes, scene.masks
    if boxes is not None:
        boxes = F.resize(boxes, size)
    if masks is not None and masks.shape[1:] != torch.Size(size):
        # As an image: resize of a Mask uses NEAREST in some versions, whatever is requested.
        pixels = F.resize(
            masks.as_subclass(torch.Tensor), size, interpolation=InterpolationMode.NEAREST_EXACT
        )
        masks = tv_tensors.Mask(pixels)
    if plan.flip:
        image = F.horizontal_flip(image)
        boxes = None if boxes is None else F.horizontal_flip(boxes)
        masks = None if masks is None else F.horizontal_flip(masks)
    return Scene(image, boxes, masks)


def choose_corner(mask: Uint8, crop: RatioCrop, draw: Float64) -> tuple[int, int]:
    """Choose a crop: the first one drawn that no class dominates, or the last one.

    As in mmsegmentation's RandomCrop, a crop is also rejected if it has only one class, or no pixel
    that counts.

    Args:
        mask: uint8 (h, w), class ids of the resized image.
        crop: Gives the size of the crop and the largest share of a class.
        draw: float64 (count,), random numbers of the sample.

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


def crop_scene(scene: Scene, top: int, left: int, side: int) -> Scene:
    """Cut a square out of an image and its mask. The part outside the image is left out."""
    height = min(side, scene.image.shape[1] - top)
    width = min(side, scene.image.shape[2] - left)
    masks = scene.masks
    return Scene(
        F.crop(scene.image, top, left, height, width),
        None,
        None if masks is None else F.crop(masks, top, left, height, width),
    )


def distort(image: torch.Tensor, draw: Sequence[float] | Float64) -> torch.Tensor:
    """Change brightness, contrast, saturation and hue, each with probability one half.

    This is mmsegmentation's PhotoMetricDistortion (mmseg/datasets/transforms/transforms.py), after
    SSD (Liu et al., ECCV 2016). Brightness adds up to 32 of 255, with either sign. Contrast
    multiplies by 0.5 to 1.5, before or after the next two. Saturation (HSV) is multiplied by 0.5 to
    1.5. Hue is rotated by up to a tenth of the circle. Values are clipped to 0..255 after each step
    and rounded once, at the end.

    Args:
        image: uint8 (3, H, W).
        draw: float64 (count,), random numbers of the sample.

    Returns:
        uint8 (3, H, W).
    """
    brighter, delta, late, contrast, factor, saturate, more, hue, turn = (
        float(v) for v in draw[_COLOR:_CORNER]
    )
    x = image.contiguous().float()  # planar: hue takes two thirds of the time
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
    """Multiply HSV's saturation, limited to 1.

    Hue and value are unchanged, so the distance of each channel from the largest one is multiplied.
    """
    value = x.amax(0, keepdim=True)
    span = value - x.amin(0, keepdim=True)
    if factor <= 1:
        return value - (value - x) * factor
    most = value / span.clamp_(min=1e-6)  # grey has no span and remains grey
    return value - (value - x) * most.clamp_(max=factor)
