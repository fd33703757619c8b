"""Antialiased bilinear resize of a region of a picture: the filter of Pillow's BILINEAR and of
torchvision's `resize(antialias=True)`, separable, in 16-bit fixed point.

Samples lie at half-pixel centres. The filter is a triangle whose half-width is one source pixel
where the region grows and the ratio of the sides where it shrinks; taps outside the region are
dropped and the rest made to sum to one. A product keeps the upper 16 bits of (8.8 bit pixel) x
(0.16 bit weight); half a unit per tap is added back, because those bits are cut and not rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_ONE = 65536  # a weight of one
_HALF = 128  # half a grey level in 8.8 bits
_GROUP = 4  # outputs whose taps lie together in a table


@njit(nogil=True, cache=True, error_model="numpy")
def _tap_count(extent: int, side: int) -> int:  # pragma: no cover - compiled
    """Most source pixels under the filter at any place."""
    return min(extent, int(np.ceil(2.0 * max(extent / side, 1.0))))


@njit(nogil=True, cache=True, error_model="numpy")
def scratch_size(height: int, width: int, side: int) -> int:  # pragma: no cover - compiled
    """Bytes that `resample` needs for regions up to height x width and outputs up to side."""
    entries = (side + _GROUP - 1) // _GROUP * _GROUP
    taps = _tap_count(height, side) + _tap_count(width, side)
    return 32 * width + entries * (8 + 4 * taps)


@njit(nogil=True, cache=True, error_model="numpy")
def _fill_taps(
    extent: int, side: int, mirror: bool, taps: int, starts: Any, weights: Any
) -> None:  # pragma: no cover - compiled
    """First source pixel and weights of each output.

    Outputs stand in groups of four; the last group is moved back to end at the last output.

    Args:
        extent: source pixels.
        side: outputs.
        mirror: whether output 0 shows the far end.
        taps: as `_tap_count`.
        starts: int32 (4 * groups,), to be written.
        weights: uint32 (groups, taps, 4), to be written: the 16-bit weight in both halves.
    """
    ratio = extent / side
    support = max(ratio, 1.0)
    for entry in range(len(starts)):
        group = entry // _GROUP
        output = min(group * _GROUP, max(side - _GROUP, 0)) + entry % _GROUP
        output = min(output, side - 1)
        if mirror:
            output = side - 1 - output
        centre = (output + 0.5) * ratio
        start = max(min(int(np.floor(centre - support + 0.5)), extent - taps), 0)
        total = 0.0
        for k in range(taps):
            total += max(support - abs(start + k + 0.5 - centre), 0.0)
        scale = _ONE / total
        rest, largest, where = _ONE, -1, 0
        for k in range(taps):
            weight = int(max(support - abs(start + k + 0.5 - centre), 0.0) * scale + 0.5)
            rest -= weight
            if weight > largest:
                largest, where = weight, k
            weights[group, k, entry % _GROUP] = weight * 65537 if weight < _ONE else 0
        # All of the rounding error goes to one tap: a flat region stays as it is.
        largest = min(largest + rest, _ONE - 1)
        weights[group, where, entry % _GROUP] = largest * 65537
        starts[entry] = start


@njit(nogil=True, cache=True, error_model="numpy")
def _entry(output: int, side: int) -> int:  # pragma: no cover - compiled
    """Where a table of `_fill_taps` holds an output."""
    last = (side - 1) // _GROUP * _GROUP
    return output if output < last else last + output - max(side - _GROUP, 0)


@njit(nogil=True, cache=True, error_model="numpy")
def _resample_plain(
    source: Any, out: Any, rows: Any, row_weights: Any, columns: Any, column_weights: Any, line: Any
) -> None:  # pragma: no cover - compiled
    """Pixel by pixel: for what is too small for `_resample_blocks`, and its reference."""
    width, side = source.shape[1], out.shape[0]
    row_taps, column_taps = row_weights.shape[1], column_weights.shape[1]
    for y in range(side):
        entry = _entry(y, side)
        for x in range(width):
            for c in range(3):
                total = row_taps // 2
                for k in range(row_taps):
                    weight = row_weights[entry // _GROUP, k, entry % _GROUP] & 0xFFFF
                    total += (np.int64(source[rows[entry] + k, x, c]) << 8) * weight >> 16
                line[3 * x + c] = min(total, 65535)
        for x in range(side):
            entry = _entry(x, side)
            for c in range(3):
                total = column_taps // 2 + _HALF
                for k in range(column_taps):
                    weight = column_weights[entry // _GROUP, k, entry % _GROUP] & 0xFFFF
                    total += np.int64(line[3 * (columns[entry] + k) + c]) * weight >> 16
                out[y, x, c] = min(total, 65535) >> 8


@njit(nogil=True, cache=True, error_model="numpy")
def resample(
    source: Any, top: int, left: int, height: int, width: int, out: Any, flip: bool, scratch: Any
) -> None:  # pragma: no cover - compiled
    """Resize a region of source to out; no byte outside the region is read.

    Args:
        source: uint8 (H, W, 3), pixels of a row adjacent.
        top, left, height, width: the region, inside source and not empty; unchecked.
        out: uint8 (S, S, 3), contiguous.
        flip: mirror left to right.
        scratch: uint8, at least `scratch_size(height, width, S)` long; one for each thread.
    """
    side = out.shape[0]
    region = source[top : top + height, left : left + width]
    if height == side and width == side:
        if flip:
            for y in range(side):
                for x in range(side):
                    for c in range(3):
                        out[y, side - 1 - x, c] = region[y, x, c]
        else:
            out[:] = region
        return
    entries = (side + _GROUP - 1) // _GROUP * _GROUP
    row_taps, column_taps = _tap_count(height, side), _tap_count(width, side)
    at = 32 * width
    line = scratch[:at].view(np.uint16)
    rows = scratch[at : at + 4 * entries].view(np.int32)
    at += 4 * entries
    columns = scratch[at : at + 4 * entries].view(np.int32)
    at += 4 * entries
    end = at + 4 * entries * row_taps
    row_weights = scratch[at:end].view(np.uint32).reshape(entries // _GROUP, row_taps, _GROUP)
    at, end = end, end + 4 * entries * column_taps
    column_weights = scratch[at:end].view(np.uint32).reshape(entries // _GROUP, column_taps, _GROUP)
    _fill_taps(height, side, False, row_taps, rows, row_weights)
    _fill_taps(width, side, flip, column_taps, columns, column_weights)
    _resample_plain(region, out, rows, row_weights, columns, column_weights, line)
