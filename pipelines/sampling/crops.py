"""Crop box and flip of a sample: a pure function of (seed, epoch, sample index).

All engines cut the boxes made here, so they differ only in decoder and resampling filter, and a
run resumed at any step, on any number of workers or ranks, sees the same crops. Random numbers come
from a counter-based generator: no state, no order of calls.
"""

from __future__ import annotations

import numpy as np

from pipelines.arrays import Float64, Int32, Int64
from pipelines.sampling.random_bits import uniforms
from pipelines.spec import CenterCrop, Crop, LoaderSpec, RandomCrop, RandomResizedCrop, Resize

_TRIES = 10  # torchvision's RandomResizedCrop draws ten boxes before it falls back to the centre
_FLIP, _PLACE, _SHAPE = 0, 1, 3  # first draw of each use; _SHAPE takes 2 * _TRIES
_DRAWS = _SHAPE + 2 * _TRIES


def crop_boxes(
    spec: LoaderSpec, *, epoch: int, indices: Int64, heights: Int32, widths: Int32
) -> Int32:
    """Boxes of some samples.

    Args:
        spec: crop, flip and seed are read.
        epoch: counted from 0.
        indices: int64 (B,), positions in the data set's index.
        heights: int32 (B,), of the upright images, in pixels.
        widths: as heights.

    Returns:
        int32 (B, 5): top, left, height, width in pixels of the upright image, and flip as 0 or 1.
        Boxes of a padded crop may begin above or left of the image or end beyond it.
    """
    draws = uniforms(spec.seed, epoch, indices, count=_DRAWS)
    out = np.empty((len(indices), 5), np.int32)
    out[:, :4] = _crop(spec.crop, draws, heights.astype(np.int64), widths.astype(np.int64))
    out[:, 4] = (draws[:, _FLIP] < 0.5) & spec.flip
    return out


def _crop(crop: Crop, draws: Float64, heights: Int64, widths: Int64) -> Int64:
    match crop:
        case RandomResizedCrop():
            return _random_resized(crop, draws, heights, widths)
        case Resize():
            zero = np.zeros_like(heights)
            return np.stack([zero, zero, heights, widths], axis=1)
        case CenterCrop():
            side = _side(crop.size, crop.resize, heights, widths)
            # Floor division also centres a box that is larger than the image.
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
            corner = _below(draws[:, _PLACE : _PLACE + 2], room + 1) - pad[:, None]
            return np.concatenate([corner, side[:, None], side[:, None]], axis=1)


def _side(length: int, resize: int | None, heights: Int64, widths: Int64) -> Int64:
    """A length of the resized image in pixels of the stored one, at least one pixel."""
    if resize is None:
        return np.full_like(heights, length)
    short = np.minimum(heights, widths)
    return np.maximum(np.rint(short * (length / resize)).astype(np.int64), 1)


def may_stick_out(crop: Crop) -> bool:
    """Whether any box of this crop can leave its image, whatever the image's size."""
    match crop:
        case RandomCrop():
            return crop.padding > 0  # without padding, too small an image is refused
        case CenterCrop():
            return crop.resize is None or crop.size > crop.resize
        case RandomResizedCrop() | Resize():
            return False


def patch_side(crop: Crop, heights: Int32, widths: Int32) -> int:
    """Longest side in pixels of any box that may stick out of its image; 1 where none can."""
    if isinstance(crop, RandomResizedCrop | Resize) or not may_stick_out(crop):
        return 1
    h, w = heights.astype(np.int64), widths.astype(np.int64)
    return int(_side(crop.size, crop.resize, h, w).max())


def _below(draws: Float64, stop: Int64) -> Int64:
    """Uniform integers in [0, stop) from uniforms in [0, 1)."""
    return np.minimum((draws * stop).astype(np.int64), stop - 1)


def _random_resized(
    crop: RandomResizedCrop, draws: Float64, heights: Int64, widths: Int64
) -> Int64:
    """Ten draws at once, the first that fits, else the largest centred box of allowed shape."""
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
    # The fallback: the whole image, cut to the nearest allowed aspect ratio.
    aspect_in = widths / heights
    h_fall = np.where(aspect_in < crop.ratio[0], np.rint(widths / crop.ratio[0]), heights)
    w_fall = np.where(aspect_in > crop.ratio[1], np.rint(heights * crop.ratio[1]), widths)
    h = np.where(found, h[rows, first], np.clip(h_fall, 1, heights).astype(np.int64))
    w = np.where(found, w[rows, first], np.clip(w_fall, 1, widths).astype(np.int64))
    place = draws[:, _PLACE : _PLACE + 2]
    top = np.where(found, _below(place[:, 0], heights - h + 1), (heights - h) // 2)
    left = np.where(found, _below(place[:, 1], widths - w + 1), (widths - w) // 2)
    return np.stack([top, left, h, w], axis=1)
