"""The part of a JPEG that a crop needs, as a small JPEG of its own.

A stream with restart markers is a row of entropy-coded segments that can be decoded one without the
other. Those under the crop are copied behind the stream's own head, whose frame size is set to
theirs; any decoder reads the result, and its pixels equal those of the whole image's decode.

Where a component is subsampled, libjpeg interpolates it from the two nearest samples: so the region
reaches `_MARGIN` pixels beyond the crop there, except at the image's edges, where the small
image ends as the whole one does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.native.jit import njit
from pipelines.native.llvm import copy_bytes

MISMATCH = -1
"""In place of a number of bytes: the side file and the sample's bytes contradict each other."""

MISMATCH_REASON = "its bytes do not fit the side file of segments: convert the data anew"
"""What such a sample is reported for."""

_MARGIN = 2  # one chroma sample at half resolution; those at a quarter are not interpolated


@njit
def region(
    record: Any, height: Any, width: Any, box: Any
) -> tuple[Any, Any, Any, Any]:  # pragma: no cover - compiled
    """Segments under a crop: first row of MCUs and the end, first segment of a row and the end.

    Args:
        record: of `segments.RECORD`, one that can be cut.
        height, width: of the image.
        box: top, left, height, width; clamped to the image.
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
) -> tuple[Any, Any, Any, Any, Any]:  # pragma: no cover - compiled  # fmt: skip
    """Write the small JPEG that holds a crop.

    Every length, marker and size that is used is checked against the bytes first: damage is
    reported and never read or written out of bounds.

    Args:
        data: uint8 (bytes,), in which the sample lies.
        start, size: where.
        record: of `segments.RECORD`.
        lengths: uint16, as `Segments.lengths`.
        height, width: of the image.
        box: int32 (4 or more,): top, left, height, width; it may stick out.
        out: uint8, at least `size` long.

    Returns:
        The number of bytes written; 0 where the stored bytes are to be decoded as they are, because
        all of them are needed or they cannot be cut; `MISMATCH` where the record does not fit them.
        Then row and column of the small image's corner in the whole one, its height and width.
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
    first_row, end_row, first, end = region(record, height, width, box)
    row_count = columns // interval
    if end_row - first_row == rows and end - first == row_count:
        return 0, 0, 0, height, width
    head, count, place = np.int64(record.head), rows * row_count, np.int64(record.first)
    if size > len(out) or size > len(data) or start < 0 or start > len(data) - size:
        return bad
    if place < 0 or count > len(lengths) or place > len(lengths) - count:
        return bad
    sample, lengths = data[start : start + size], lengths[place : place + count]
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
        # The markers behind the copied segments count from 0 to 7 in the small stream's own order.
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
def _ends_segment(sample: Any, end: Any, k: Any, count: Any) -> bool:  # pragma: no cover - compiled
    """Whether the marker in front of `end` is the one behind segment k of count."""
    if k < 0:
        return True
    marker = 0xD9 if k == count - 1 else 0xD0 + (k & 7)
    return bool(sample[end - 2] == 0xFF and sample[end - 1] == marker)


@njit
def _head_fits(
    sample: Any, record: Any, height: Any, width: Any
) -> bool:  # pragma: no cover - compiled
    """Whether the stream has a baseline frame of this size and MCU, and its scan ends at `head`."""
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
