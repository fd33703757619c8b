"""Antialiased bilinear resize of image regions, separable, in 16-bit fixed point.

The filter is that of Pillow's BILINEAR and torchvision's `resize(antialias=True)`: a triangle
around half-pixel centres. Its half-width is one source pixel for enlarging, and the ratio of the
sides for shrinking. Taps outside the region are dropped and the rest normalised to sum to one. A
product keeps the upper 16 bits of (8.8 bit pixel) x (0.16 bit weight); half a unit per tap is added
back, because the lower bits are truncated.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pipelines.imaging.resize_simd import GROUP, filter_columns, filter_rows, filter_rows_skip4
from pipelines.native.jit import njit
from pipelines.native.llvm import copy_bytes, get_byte, set_byte

_ONE = 65536  # a weight of one
_HALF = 128  # half a grey level in 8.8 bits


def scratch_size(height: int, width: int, side: int) -> int:
    """Number of uint32 words of scratch memory that `resize_region` needs.

    The size suffices for all regions up to height x width and outputs up to side. A table has at
    most 4 * extent + 2 * entries weights: a smaller output has fewer entries with more taps each.
    """
    entries = math.ceil(side / GROUP) * GROUP
    return 8 * width + 2 * entries + 4 * (height + width + entries)


@njit
def _fill_taps(extent: Any, side: Any, mirror: Any, taps: Any, starts: Any, weights: Any) -> None:
    """Compute the first source pixel and the weights of each output.

    Outputs are in groups of four; the last group is moved back to end at the last output.

    Args:
        extent: Number of source pixels.
        side: Number of outputs.
        mirror: Whether output 0 shows the far end.
        taps: Taps per output.
        starts: uint32 (4 * groups,), output.
        weights: uint32 (groups * taps * 4,), output: the 16-bit weight in both halves. Tap k of the
            four outputs of a group is contiguous.
    """
    ratio = extent / side
    support = max(ratio, 1.0)
    for entry in range(len(starts)):
        output = min(entry // GROUP * GROUP, max(side - GROUP, 0)) + entry % GROUP
        output = min(output, side - 1)
        if mirror:
            output = side - 1 - output
        centre = (output + 0.5) * ratio
        start = max(min(math.floor(centre - support + 0.5), extent - taps), 0)
        total = 0.0
        for k in range(taps):
            total += max(support - abs(start + k + 0.5 - centre), 0.0)
        scale = _ONE / total
        at = entry // GROUP * GROUP * taps + entry % GROUP
        rest, largest, where = _ONE, -1, 0
        for k in range(taps):
            weight = int(max(support - abs(start + k + 0.5 - centre), 0.0) * scale + 0.5)
            rest -= weight
            if weight > largest:
                largest, where = weight, k
            weights[at + GROUP * k] = weight * 65537 if weight < _ONE else 0
        # All of the rounding error goes to one tap, so that a flat region stays unchanged.
        largest = min(largest + rest, _ONE - 1)
        weights[at + GROUP * where] = largest * 65537
        starts[entry] = start


@njit
def _entry(output: int, side: int) -> int:
    """Index of an output in the tables of `_fill_taps`."""
    last = (side - 1) // GROUP * GROUP
    return output if output < last else last + output - max(side - GROUP, 0)


@njit
def _resample_plain(
    source: Any, stride: Any, width: Any, out: Any, side: Any, row_taps: Any, column_taps: Any,
    rows: Any, row_weights: Any, columns: Any, column_weights: Any, line: Any,
) -> None:  # fmt: skip
    """Resample pixel by pixel: for sizes too small for `_resample_blocks`, and as its reference."""
    for y in range(side):
        entry = _entry(y, side)
        for x in range(3 * width):
            at = source + rows[entry] * stride + x
            total = row_taps // 2
            for k in range(row_taps):
                index = (entry // GROUP * row_taps + k) * GROUP + entry % GROUP
                weight = np.int64(row_weights[index] & 0xFFFF)
                total += (get_byte(at + k * stride) << 8) * weight >> 16
            line[x] = min(total, 65535)
        for x in range(side):
            entry_x = _entry(x, side)
            for c in range(3):
                total = column_taps // 2 + _HALF
                for k in range(column_taps):
                    index = (entry_x // GROUP * column_taps + k) * GROUP + entry_x % GROUP
                    weight = np.int64(column_weights[index] & 0xFFFF)
                    pixel = np.int64(line[3 * (columns[entry_x] + k) + c])
                    total += pixel * weight >> 16
                set_byte(out + 3 * (y * side + x) + c, min(total, 65535) >> 8)


@njit
def _resample_blocks(
    source: Any, stride: Any, width: Any, out: Any, side: Any, row_taps: Any, column_taps: Any,
    rows: Any, row_weights: Any, columns: Any, column_weights: Any, line: Any,
) -> None:  # fmt: skip
    """Resample as `_resample_plain`, in blocks of four outputs in four rows."""
    pitch, middle = 3 * side, np.int64(line.ctypes.data)
    starts, column_table = np.int64(columns.ctypes.data), np.int64(column_weights.ctypes.data)
    for entry in range(0, len(rows), GROUP):
        y = min(entry, side - GROUP)
        weights = np.int64(row_weights.ctypes.data) + 4 * entry * row_taps
        a = source + np.int64(rows[entry]) * stride
        b = source + np.int64(rows[entry + 1]) * stride
        c = source + np.int64(rows[entry + 2]) * stride
        d = source + np.int64(rows[entry + 3]) * stride
        rest = (stride, row_taps, weights, row_taps // 2)
        filter_rows((a, b, c, d, *rest, middle))
        for pixel in range(4, width + 3, 4):
            # The 16 bytes end with the block's last pixel, so that none is read beyond the row.
            x = 3 * min(pixel, width - 4)
            filter_rows_skip4(
                (a + x - 4, b + x - 4, c + x - 4, d + x - 4, *rest, middle + 32 * x // 3)
            )
        for at in range(0, len(columns), GROUP):
            filter_columns(
                (
                    middle, starts + 4 * at, column_taps,
                    column_table + 4 * at * column_taps, column_taps // 2 + _HALF,
                    out + y * pitch + 3 * min(at, side - GROUP), pitch,
                )
            )  # fmt: skip


@njit
def resize_region(
    source: Any, stride: Any, height: Any, width: Any, out: Any, side: Any, flip: Any, scratch: Any
) -> None:
    """Resize a region of an image to a square; no byte outside the region is read.

    Takes int64 addresses, because numba would compile again for every array layout.

    Args:
        source: Address of the region's first byte, uint8 (height, width, 3), not empty.
        stride: Bytes from one row to the next.
        height, width: Size of the region.
        out: Address of the square, uint8 (side, side, 3), contiguous.
        side: Side of the square.
        flip: Whether to mirror left to right.
        scratch: uint32 (at least `scratch_size(height, width, side)`,); one per thread.
    """
    if height == side and width == side:
        for y in range(side):
            row, line = source + y * stride, out + 3 * side * y
            if not flip:
                copy_bytes(line, row, 3 * side)
                continue
            for x in range(side):
                for c in range(3):
                    set_byte(line + 3 * (side - 1 - x) + c, get_byte(row + 3 * x + c))
        return
    # The largest number of pixels under the filter at any position.
    row_taps = min(height, math.ceil(2.0 * max(height / side, 1.0)))
    column_taps = min(width, math.ceil(2.0 * max(width / side, 1.0)))
    entries = (side + GROUP - 1) // GROUP * GROUP
    at = 8 * width
    line, rows = scratch[:at], scratch[at : at + entries]
    at += entries
    columns = scratch[at : at + entries]
    at += entries
    row_weights = scratch[at : at + entries * row_taps]
    column_weights = scratch[at + entries * row_taps :][: entries * column_taps]
    _fill_taps(height, side, np.bool_(False), row_taps, rows, row_weights)
    _fill_taps(width, side, flip, column_taps, columns, column_weights)
    if width < 6 or side < GROUP:
        _resample_plain(
            source, stride, width, out, side, row_taps, column_taps, rows, row_weights, columns,
            column_weights, line,
        )  # fmt: skip
    else:
        _resample_blocks(
            source, stride, width, out, side, row_taps, column_taps, rows, row_weights, columns,
            column_weights, line,
        )  # fmt: skip
