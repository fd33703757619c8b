"""Color jitter and PCA lighting on the device: a pure function of (seed, epoch, sample index).

Brightness, contrast, saturation and hue follow torchvision's `ColorJitter`: each sample has its own
factors and its own order of operations. Every operation rounds down to integers of 0 to 255, as
torchvision does for uint8 images. Lighting is AlexNet's noise along the principal colors of
ImageNet (Krizhevsky et al. 2012, section 4.1), added last and not rounded. Constants and order are
those of mmselfsup 0.x (mmselfsup/datasets/pipelines/transforms.py).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipelines.arrays import Float32, Int64
from pipelines.batch import Regions
from pipelines.device.rotate import normalize_views
from pipelines.sampling.random_bits import uniforms
from pipelines.spec import ColorJitter, Normalize

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Columns of `JitterParams.factors`, and values of `JitterParams.order`."""

_STREAM = 0xC0104  # separates these random numbers from those of crop boxes
_UNIT = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_GREY = (0.2989, 0.587, 0.114)
# Principal components of ImageNet's colors, in units of 0 to 1: deviations; directions as columns.
_DEVIATIONS = np.array([0.2175, 0.0188, 0.0045])
_DIRECTIONS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


class JitterParams(NamedTuple):
    """Parameters of color jitter and lighting for B samples, on the CPU."""

    factors: Float32
    """(B, 4), factors of brightness, contrast and saturation (1: unchanged), and the hue shift."""
    order: Int64
    """(B, n), the n enabled operations in the order of each sample."""
    shifts: Float32
    """(B, 3), what lighting adds to red, green and blue, in units of 0 to 255."""


def draw_jitter(color: ColorJitter, *, seed: int, epoch: int, indices: Int64) -> JitterParams:
    """Draw the parameters of B samples.

    Args:
        color: Ranges of the factors and deviation of lighting.
        seed: Seed; together with epoch and index, the key of the random numbers.
        epoch: Counted from 0.
        indices: int64 (B,), positions in the data set's index.

    Returns:
        The parameters, a pure function of the arguments.
    """
    draws = uniforms(seed, epoch, indices, stream=_STREAM, count=14)
    strengths = (color.brightness, color.contrast, color.saturation)
    low = np.array([*(max(0.0, 1 - s) for s in strengths), -color.hue])
    high = np.array([*(1 + s for s in strengths), color.hue])
    used = np.flatnonzero([*strengths, color.hue])
    # Normal numbers by the Box-Muller transform; 1 - u is never zero.
    radius = np.sqrt(-2 * np.log(1 - draws[:, 8:11]))
    alphas = color.lighting * radius * np.cos(2 * np.pi * draws[:, 11:14])
    return JitterParams(
        (low + (high - low) * draws[:, :4]).astype(np.float32),
        used[np.argsort(draws[:, 4 : 4 + len(used)], axis=1)],
        (255 * (alphas * _DEVIATIONS) @ _DIRECTIONS.T).astype(np.float32),
    )


def jitter_views(
    images: torch.Tensor | Regions,
    params: JitterParams,
    *,
    normalize: Normalize,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Jitter the colors, then normalise: `normalize_views` with one view and changed colors.

    Args:
        images: uint8 (B, S, S, 3), RGB, or regions to be resized to S.
        params: Parameters of the same samples.
        normalize: Mean and standard deviation per channel, in units of 0 to 255.
        dtype: Dtype of the result.

    Returns:
        (B, 3, S, S) in channels_last memory format, on the device of the images.

    Raises:
        ValueError: As `normalize_views`.
    """
    x = normalize_views(images, views=1, normalize=_UNIT, dtype=torch.float32)
    x = jitter(x, params) + _to_device(params.shifts, x).view(-1, 3, 1, 1)
    mean, scale = _statistics(normalize, x.device)
    return ((x - mean) * scale).to(dtype, memory_format=torch.channels_last)


@functools.cache
def _statistics(normalize: Normalize, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / std, float32 (1, 3, 1, 1), copied to the device once."""
    mean = torch.tensor(normalize.mean).view(1, 3, 1, 1)
    scale = torch.tensor([1 / std for std in normalize.std]).view(1, 3, 1, 1)
    return mean.to(device), scale.to(device)


def jitter(x: torch.Tensor, params: JitterParams) -> torch.Tensor:
    """Apply the enabled operations in each sample's own order.

    Args:
        x: float32 (B, 3, S, S), RGB, integers of 0 to 255.
        params: Parameters of the same samples.

    Returns:
        float32 (B, 3, S, S), integers of 0 to 255.
    """
    for operations in params.order.T:
        rows = np.arange(len(operations))
        factors = _to_device(params.factors[rows, operations], x)
        blended, hue_rows = operations != HUE, np.flatnonzero(operations == HUE)
        red, green, blue = x.unbind(1)
        grey = (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue).floor_()[:, None]
        mean = grey.mean((1, 2, 3), keepdim=True)
        kind = _to_device(operations, x)
        toward = torch.where(kind == CONTRAST, mean, grey)
        toward = torch.where(kind == BRIGHTNESS, torch.zeros_like(mean), toward)
        factor = torch.where(_to_device(blended, x), factors, torch.ones_like(factors))
        result = (factor * x + (1 - factor) * toward).clamp_(0, 255).floor_()
        if len(hue_rows):
            picked = _to_device(hue_rows, x).view(-1)
            result[picked] = _shift_hue(x[picked], factors[picked])
        x = result
    return x


def _to_device(values: npt.NDArray[np.generic], x: torch.Tensor) -> torch.Tensor:
    """Copy values to x's device as (..., 1, 1, 1). Pinned memory keeps the host from waiting."""
    tensor = torch.from_numpy(values)
    if x.is_cuda:
        tensor = tensor.pin_memory().to(x.device, non_blocking=True)
    return tensor.view(-1, 1, 1, 1)


def _shift_hue(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Shift the hue in HSV space, as torchvision does for uint8 images."""
    unit = x / 255
    value, low = unit.amax(1, keepdim=True), unit.amin(1, keepdim=True)
    span = value - low
    safe = torch.where(span == 0, torch.ones_like(span), span)
    saturation = span / torch.where(span == 0, torch.ones_like(value), value)
    red, green, blue = ((value - unit[:, i : i + 1]) / safe for i in range(3))
    is_red = unit[:, :1] == value
    is_green = (unit[:, 1:2] == value) & ~is_red
    hue = torch.where(is_red, blue - green, torch.where(is_green, 2 + red - blue, 4 + green - red))
    hue = (hue / 6 + 1) % 1
    hue = (hue + shift) % 1
    sector = (hue * 6).floor()
    part = hue * 6 - sector
    p = (value * (1 - saturation)).clamp(0, 1)
    q = (value * (1 - saturation * part)).clamp(0, 1)
    t = (value * (1 - saturation * (1 - part))).clamp(0, 1)
    sector = sector.long() % 6
    wheels = ((value, q, p, p, t, value), (t, value, value, q, p, p), (p, p, t, value, value, q))
    channels = [torch.cat(wheel, 1).gather(1, sector) for wheel in wheels]
    return (torch.cat(channels, 1) * (256 - 1e-3)).floor()
