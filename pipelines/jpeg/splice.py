"""JPEG splicing: build a small JPEG from only those segments of a stream that a crop needs.

A stream with restart markers is a sequence of entropy-coded segments that can be decoded
independently. The segments under the crop are copied after the stream's own header, whose frame
size is set to theirs. Any decoder can read the result, and its pixels equal those of the fully
decoded image.

libjpeg interpolates subsampled components from the two nearest samples. For these the copied area
extends `_MARGIN` pixels beyond the crop, except at the image's edges, where both images end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.native.jit import njit
from pipelines.native.llvm import copy_bytes

MISMATCH = -1
"""Returned instead of a number of bytes: the side file contradicts the sample's bytes."""

MISMATCH_REASON = "its bytes do not fit the side file of segments: convert the data again"
"""The error message for such a sample."""

_MARGIN = 2  # one chroma sample at half resolution; quarter resolution is not interpolated


@njit
def segment_range(record: Any, height: Any, width: Any, box: Any) -> tuple[Any, Any, Any, Any]:
    """Find the segments under a crop.

    Args:
        record: One entry of `segments.RECORD` dtype, of a stream that can be cut.
        height, width: Size of the image.
        box: int32 (4 or more,), top, left, height, width; clamped to the image.

    Returns:
        First and end row of MCUs; first and end segment in each of these rows.
    """
    mcu_height, mcu_width = np.int64(record.mcu_height), np.int64(record.mcu_width)
    y_margin = _MARGIN if mcu_height > 8 else 0
    x_margin = _MARGIN if mcu_width > 8 else 0
    top = min(max(np.int64(box[0]) - y_margin, 0), height - 1)
    left = min(max(np.int64(box[1]) - x_margin, 0), width - 1)
    bottom = max(min(np.int64(box[0]) + box[2] + y_margin, height), top + 1)
    right = max(min(np.int64(box[1]) + box[3] + x_margin, width), left + 1)
    step = np.int64(record.interval) * mcu_width
    return top // mcu_height, -(-bottom // mcu_height), left // step, -(-right // step)


@njit
def splice(
    data: Any, start: Any, size: Any, record: Any, lengths: Any, height: Any, width: Any, box: Any,
    out: Any,
) -> tuple[Any, Any, Any, Any, Any]:  # fmt: skip
    """Write the small JPEG that contains a crop.

    Every length, marker and size is checked against the bytes before use. Damage is reported and
    never causes an out-of-bounds read or write.

    Args:
        data: uint8 (bytes,), a buffer that contains the sample.
        start, size: Offset and length of the sample in it.
        record: The sample's entry of `segments.RECORD` dtype.
        lengths: uint16 (segments,), as `Segments.lengths`.
        height, width: Size of the image.
        box: int32 (4 or more,), top, left, height, width; it may extend beyond the image.
        out: uint8 (at least `size`,), output.

    Returns:
        The number of bytes written, or 0 if the stored bytes must be decoded as they are (all are
        needed or they cannot be cut), or `MISMATCH` if the record does not match them. Then the top
        and left of the small image in the whole one, and its height and width.
    """
    interval = np.int64(record.interval)
    if interval == 0:
        return 0, 0, 0, height, width
    columns, rows = np.int64(record.columns), np.int64(record.rows)
    mcu_height, mcu_width = np.int64(record.mcu_height), np.int64(record.mcu_width)
    bad = (MISMATCH, 0, 0, 0, 0)
    if mcu_height == 0 or mcu_width == 0 or columns % interval != 0 or height < 1 or width < 1:
        return bad
    if -(-height // mcu_height) != rows or -(-width // mcu_width) != columns:
        return bad
    first_row, end_row, first, end = segment_range(record, height, width, box)
    row_count = columns // interval
    if end_row - first_row == rows and end - first == row_count:
        return 0, 0, 0, height, width
    head, count, offset = np.int64(record.head), rows * row_count, np.int64(record.first)
    if size > len(out) or size > len(data) or start < 0 or start > len(data) - size:
        return bad
    if offset < 0 or count > len(lengths) or offset > len(lengths) - count:
        return bad
    sample, lengths = data[start : start + size], lengths[offset : offset + count]
    total = np.int64(0)
    for one in range(count):
        total += np.int64(lengths[one])
    if head + total + 2 * count != size:
        return bad
    if not _head_fits(sample, record, height, width):
        return bad
    to, origin = np.int64(out.ctypes.data), np.int64(data.ctypes.data) + start
    copy_bytes(to, origin, head)
    frame = np.int64(record.frame)
    y0, x0 = first_row * mcu_height, first * interval * mcu_width
    small_height = min(end_row * mcu_height, height) - y0
    small_width = min(end * interval * mcu_width, width) - x0
    out[frame], out[frame + 1] = small_height >> 8, small_height & 255
    out[frame + 2], out[frame + 3] = small_width >> 8, small_width & 255
    at, done = head, np.int64(0)
    source: Any = head + 2 * first_row * row_count
    for above in range(first_row * row_count):
        source += np.int64(lengths[above])
    for row in range(first_row, end_row):
        k = row * row_count
        for _ in range(first):
            source = source + np.int64(lengths[k]) + 2
            k += 1
        if not _ends_segment(sample, source, k - 1, count):
            return bad
        begin, at_row = source, at
        for _ in range(end - first):
            source = source + np.int64(lengths[k]) + 2
            if not _ends_segment(sample, source, k, count):
                return bad
            k += 1
        at += source - begin
        copy_bytes(to + at_row, origin + begin, at - at_row)
        # Renumber the markers after the copied segments: 0 to 7, in the small stream's order.
        mark, k = at_row, row * row_count + first
        for _ in range(end - first):
            mark += np.int64(lengths[k]) + 2
            out[mark - 1] = 0xD0 + (done & 7)
            k += 1
            done += 1
        for _ in range(end, row_count):
            source = source + np.int64(lengths[k]) + 2
            k += 1
    out[at - 1] = 0xD9
    return at, y0, x0, small_height, small_width


@njit
def _ends_segment(sample: Any, end: Any, k: Any, count: Any) -> bool:
    """Whether the marker that ends at `end` is the right one for segment k of count."""
    if k < 0:
        return True
    marker = 0xD9 if k == count - 1 else 0xD0 + (k & 7)
    return bool(sample[end - 2] == 0xFF and sample[end - 1] == marker)


@njit
def _head_fits(sample: Any, record: Any, height: Any, width: Any) -> bool:
    """Whether the baseline frame has this size and MCU, and the scan header ends at `head`."""
    head, frame = np.int64(record.head), np.int64(record.frame)
    if head > len(sample) or frame < 7 or frame + 5 > head or sample[0] != 0xFF:
        return False
    components = np.int64(sample[frame + 4])
    scan = head - 8 - 2 * components
    if components < 1 or components > 4 or frame + 5 + 3 * components > scan:
        return False
    if sample[frame - 5] != 0xFF or (sample[frame - 4] != 0xC0 and sample[frame - 4] != 0xC1):
        return False
    if np.int64(sample[frame]) * 256 + sample[frame + 1] != height:
        return False
    if np.int64(sample[frame + 2]) * 256 + sample[frame + 3] != width:
        return False
    if sample[scan] != 0xFF or sample[scan + 1] != 0xDA or sample[scan + 4] != components:
        return False
    across, down = np.int64(1), np.int64(1)
    if components > 1:
        for c in range(components):
            factors = np.int64(sample[frame + 6 + 3 * c])
            across, down = max(across, factors >> 4), max(down, factors & 15)
    return bool(8 * across == record.mcu_width and 8 * down == record.mcu_height)
