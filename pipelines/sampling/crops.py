"""Crop boxes and flips: pure functions of (seed, epoch, sample index).

All engines use these boxes. They differ only in decoder and resize filter. A run resumed at any
step, with any number of workers or ranks, sees the same crops. The random generator is
counter-based: it has no state, and the order of calls does not matter.
"""

from __future__ import annotations

import numpy as np

from pipelines.arrays import Float64, Int32, Int64
from pipelines.sampling.random_bits import uniforms
from pipelines.spec import CenterCrop, Crop, LoaderSpec, RandomCrop, RandomResizedCrop, Resize

_TRIES = 10  # torchvision's RandomResizedCrop draws ten boxes, then falls back to the center
# Columns of the random numbers: flip 1, position 2, shape 2 * _TRIES.
_FLIP, _POSITION, _SHAPE = 0, 1, 3
_DRAWS = _SHAPE + 2 * _TRIES


def crop_boxes(
    spec: LoaderSpec, *, epoch: int, indices: Int64, heights: Int32, widths: Int32
) -> Int32:
    """Compute the crop boxes and flips of samples.

    Args:
        spec: Gives crop, flip and seed.
        epoch: Counted from 0.
        indices: int64 (B,), positions in the data set's index.
        heights: int32 (B,), heights of the upright images, in pixels.
        widths: int32 (B,), their widths.

    Returns:
        int32 (B, 5): top, left, height, width in pixels of the upright image, and flip as 0 or 1.
        With padding, boxes may extend beyond the image on any side.

    Raises:
        ValueError: An image is too small for a `RandomCrop`.
    """
    draws = uniforms(spec.seed, epoch, indices, count=_DRAWS)
    out = np.empty((len(indices), 5), np.int32)
    out[:, :4] = _crop(spec.crop, draws, heights.astype(np.int64), widths.astype(np.int64))
    out[:, 4] = (draws[:, _FLIP] < 0.5) & spec.flip
    return out


def _crop(crop: Crop, draws: Float64, heights: Int64, widths: Int64) -> Int64:
    """Compute top, left, height and width, int64 (B, 4), from random numbers (B, _DRAWS)."""
    match crop:
        case RandomResizedCrop():
            return _random_resized(crop, draws, heights, widths)
        case Resize():
            zero = np.zeros_like(heights)
            return np.stack([zero, zero, heights, widths], axis=1)
        case CenterCrop():
            side = _side(crop.size, crop.resize, heights, widths)
            # Floor division also centres boxes that are larger than the image.
            return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)
        case RandomCrop():
            side = _side(crop.size, crop.resize, heights, widths)
            pad = _side(crop.padding, crop.resize, heights, widths)
            if crop.padding == 0:
                pad = np.zeros_like(side)
            room = np.stack([heights, widths], axis=1) + 2 * pad[:, None] - side[:, None]
            if (room < 0).any():
                i = int(np.flatnonzero((room < 0).any(axis=1))[0])
                raise ValueError(
                    f"an image of {widths[i]}x{heights[i]} pixels with {crop.padding} pixels of "
                    f"padding is too small for a crop of {crop.size}; set crop.resize"
                )
            corner = _below(draws[:, _POSITION : _POSITION + 2], room + 1) - pad[:, None]
            return np.concatenate([corner, side[:, None], side[:, None]], axis=1)


def _side(length: int, resize: int | None, heights: Int64, widths: Int64) -> Int64:
    """Convert a length in the resized image to pixels of the stored image, at least 1."""
    if resize is None:
        return np.full_like(heights, length)
    short = np.minimum(heights, widths)
    return np.maximum(np.rint(short * (length / resize)).astype(np.int64), 1)


def can_exceed_image(crop: Crop) -> bool:
    """Return whether boxes of this crop can extend beyond the image, for any image size."""
    match crop:
        case RandomCrop():
            return crop.padding > 0  # without padding, `_crop` refuses images that are too small
        case CenterCrop():
            return crop.resize is None or crop.size > crop.resize
        case RandomResizedCrop() | Resize():
            return False


def padded_side(crop: Crop, heights: Int32, widths: Int32) -> int:
    """Return the longest side of all boxes that can extend beyond their image.

    Args:
        crop: The crop.
        heights: int32 (N,), heights of the upright images, in pixels.
        widths: int32 (N,), their widths.

    Returns:
        The side in pixels; 1 if no box can extend beyond its image.
    """
    if isinstance(crop, RandomResizedCrop | Resize) or not can_exceed_image(crop):
        return 1
    h, w = heights.astype(np.int64), widths.astype(np.int64)
    return int(_side(crop.size, crop.resize, h, w).max())


def _below(draws: Float64, stop: Int64) -> Int64:
    """Map uniform numbers in [0, 1) to integers in [0, stop)."""
    return np.minimum((draws * stop).astype(np.int64), stop - 1)


def _random_resized(
    crop: RandomResizedCrop, draws: Float64, heights: Int64, widths: Int64
) -> Int64:
    """Try ten random boxes. Take the first that fits, else the largest centered allowed box."""
    shape = draws[:, _SHAPE:].reshape(-1, 2, _TRIES)
    low, high = crop.scale
    area = (heights * widths)[:, None] * (low + (high - low) * shape[:, 0])
    log_low, log_high = np.log(crop.ratio)
    aspect = np.exp(log_low + (log_high - log_low) * shape[:, 1])
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (h > 0) & (w <= widths[:, None]) & (h <= heights[:, None])
    first = fits.argmax(axis=1)
    rows = np.arange(len(heights))
    found = fits[rows, first]
    # Fallback: the whole image, cropped to the nearest allowed aspect ratio.
    aspect_in = widths / heights
    h_fall = np.where(aspect_in < crop.ratio[0], np.rint(widths / crop.ratio[0]), heights)
    w_fall = np.where(aspect_in > crop.ratio[1], np.rint(heights * crop.ratio[1]), widths)
    h = np.where(found, h[rows, first], np.clip(h_fall, 1, heights).astype(np.int64))
    w = np.where(found, w[rows, first], np.clip(w_fall, 1, widths).astype(np.int64))
    position = draws[:, _POSITION : _POSITION + 2]
    top = np.where(found, _below(position[:, 0], heights - h + 1), (heights - h) // 2)
    left = np.where(found, _below(position[:, 1], widths - w + 1), (widths - w) // 2)
    return np.stack([top, left, h, w], axis=1)
