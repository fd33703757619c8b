"""Triton kernel for rotation and normalisation: every pixel is read once and written once per view.

A tile of pixels is loaded, normalised and written to the views of 0 and 180 degrees. It is
transposed in shared memory for the two quarter turns, so that neighbouring threads always write
neighbouring words. Tile size and warps are fixed, without autotuning: the first call costs one
compilation (cached on disk by Triton), and later calls may be captured into a CUDA graph.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from pipelines.batch import Regions
from pipelines.spec import Normalize

# Kernels are not annotated: Triton's compiler would try to resolve the names.
_TILE, _REGION_TILE = 32, 16  # pixels per side; a resized pixel needs more registers
_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _write_tile(  # type: ignore[no-untyped-def]
    pixels, y, x, out, constants, i, batch, side, VIEWS: tl.constexpr
):
    """Normalise pixels (TILE, TILE, 4) of crop i at rows y and columns x; write its views."""
    c = tl.arange(0, 4)
    mean = tl.load(constants + c, mask=c < 3, other=0.0)
    scale = tl.load(constants + 3 + c, mask=c < 3, other=0.0)
    # Two roundings, as in the definition: a sum and then a product cannot be fused.
    words = ((pixels - mean[None, None, :]) * scale[None, None, :]).to(out.dtype.element_ty)
    last, image = side - 1, tl.cast(side, tl.int64) * side * 3
    start = out + i * image + c[None, None, :]
    mask = (y < side)[:, None, None] & (x < side)[None, :, None] & (c < 3)[None, None, :]
    rows, columns = y[:, None, None], x[None, :, None]
    tl.store(start + (rows * side + columns) * 3, words, mask=mask)
    if VIEWS == 4:
        step = batch.to(tl.int64) * image
        upside_down = (last - rows) * side + last - columns
        tl.store(start + 2 * step + upside_down * 3, words, mask=mask)
        turned = tl.permute(words, (1, 0, 2))
        mask = (x < side)[:, None, None] & (y < side)[None, :, None] & (c < 3)[None, None, :]
        rows, columns = x[:, None, None], y[None, :, None]
        tl.store(start + step + ((last - rows) * side + columns) * 3, turned, mask=mask)
        tl.store(start + 3 * step + (rows * side + last - columns) * 3, turned, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _tile_position(side, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return crop, rows and columns of this program's tile."""
    program, tiles = tl.program_id(0), tl.cdiv(side, TILE)
    y = program // tiles % tiles * TILE + tl.arange(0, TILE)
    x = program % tiles * TILE + tl.arange(0, TILE)
    return (program // (tiles * tiles)).to(tl.int64), y, x


@triton.jit(do_not_specialize=["batch"])  # type: ignore[untyped-decorator]
def _rotate_crops(  # type: ignore[no-untyped-def]
    crops, out, constants, batch, side, VIEWS: tl.constexpr, TILE: tl.constexpr
):
    """Write the views of one tile of a crop; crops are uint8 (B, S, S, 3)."""
    i, y, x = _tile_position(side, TILE)
    c = tl.arange(0, 4)[None, None, :]
    rows, columns = y[:, None, None], x[None, :, None]
    mask = (rows < side) & (columns < side) & (c < 3)
    start = crops + i * side * side * 3
    pixels = tl.load(start + (rows * side + columns) * 3 + c, mask=mask, other=0)
    _write_tile(pixels.to(tl.float32), y, x, out, constants, i, batch, side, VIEWS)


@triton.jit
def _taps(output, extent, side):  # type: ignore[no-untyped-def]
    """Return the filter's first source pixel and centre per output, its half-width and its taps."""
    ratio = extent.to(tl.float32) / side
    support = tl.maximum(ratio, 1.0)
    taps = tl.minimum(tl.ceil(2.0 * support).to(tl.int32), extent)
    centre = (output.to(tl.float32) + 0.5) * ratio
    first = tl.floor(centre - support + 0.5).to(tl.int32)
    return tl.maximum(tl.minimum(first, extent - taps), 0), centre, support, taps


@triton.jit(do_not_specialize=["batch"])  # type: ignore[untyped-decorator]
def _rotate_regions(  # type: ignore[no-untyped-def]
    source, offsets, shapes, flips, out, constants, batch, side,
    VIEWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the views of one tile of a region, resized as in `pipelines.imaging.resize`.

    Resized values are rounded to integers before normalisation.
    """
    i, y, x = _tile_position(side, TILE)
    height, width = tl.load(shapes + 2 * i), tl.load(shapes + 2 * i + 1)
    start = source + tl.load(offsets + i)
    mirrored = tl.where(tl.load(flips + i) != 0, side - 1 - x, x)
    # In the last tile, outputs beyond the side read the last pixels; they are not written.
    top, y_centre, y_support, y_taps = _taps(tl.minimum(y, side - 1), height, side)
    left, x_centre, x_support, x_taps = _taps(
        tl.maximum(tl.minimum(mirrored, side - 1), 0), width, side
    )
    c = tl.arange(0, 4)[None, None, :]
    total = tl.zeros((TILE, TILE, 4), tl.float32)
    y_sum, x_sum = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    for k in range(x_taps):
        x_sum += tl.maximum(x_support - tl.abs(left + k + 0.5 - x_centre), 0.0)
    for j in range(y_taps):
        y_weight = tl.maximum(y_support - tl.abs(top + j + 0.5 - y_centre), 0.0)
        y_sum += y_weight
        rows = start + ((top + j).to(tl.int64) * width * 3)[:, None, None] + c
        line = tl.zeros((TILE, TILE, 4), tl.float32)
        for k in range(x_taps):
            x_weight = tl.maximum(x_support - tl.abs(left + k + 0.5 - x_centre), 0.0)
            pixels = tl.load(rows + ((left + k) * 3)[None, :, None], mask=c < 3, other=0)
            line += pixels.to(tl.float32) * x_weight[None, :, None]
        total += line * y_weight[:, None, None]
    pixels = tl.floor(total / (y_sum[:, None, None] * x_sum[None, :, None]) + 0.5)
    _write_tile(pixels, y, x, out, constants, i, batch, side, VIEWS)


@functools.cache
def _constants(normalize: Normalize, device: torch.device) -> torch.Tensor:
    """Mean and 1 / std, float32 (2, 3), cached: a host-to-device copy per batch would block."""
    mean, std = (torch.tensor(v, dtype=torch.float32) for v in (normalize.mean, normalize.std))
    return torch.stack([mean, 1.0 / std]).to(device)


def write_views(images: torch.Tensor | Regions, out: torch.Tensor, *, normalize: Normalize) -> None:
    """Resize regions if given, rotate and normalise, in one kernel.

    Args:
        images: uint8 (B, S, S, 3), or regions to be resized to S. Regions are not checked to lie
            inside their pixels, because that would wait for the device.
        out: Output (V, B, S, S, 3), contiguous, on the same device, float32, bfloat16 or float16; V
            is 1 or 4.
        normalize: Mean and standard deviation per channel, in units of 0 to 255.
    """
    views, batch, side = out.shape[:3]
    tile = _REGION_TILE if isinstance(images, Regions) else _TILE
    grid = (batch * triton.cdiv(side, tile) ** 2,)
    constants = _constants(normalize, out.device)
    options: dict[str, Any] = {
        "VIEWS": views,
        "TILE": tile,
        "num_warps": _WARPS,
        "enable_fp_fusion": False,
    }
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        if isinstance(images, Regions):
            # The kernel assumes contiguous tensors of these dtypes. Usually they are: no copy.
            pixels, offsets = images.pixels.contiguous(), images.offsets.long().contiguous()
            columns = (offsets, images.shapes.int().contiguous(), images.flips.bool().contiguous())
            _rotate_regions[grid](pixels, *columns, out, constants, batch, side, **options)
        else:
            _rotate_crops[grid](images.contiguous(), out, constants, batch, side, **options)
