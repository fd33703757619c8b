"""Compiled inner loops of the FFCV engine.

They are module-level functions because numba can cache the machine code of those on disk, but not
of the code that FFCV generates. FFCV's decoder is called by symbol name;
`pipelines.engines.ffcv.loader` binds the name to its address before the first call. Images are
passed as addresses, because every array layout would be compiled separately.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types

from pipelines.imaging.resize import resize_region
from pipelines.jpeg.splice import splice
from pipelines.native.jit import njit
from pipelines.native.llvm import clear_bytes, copy_bytes

IMDECODE = "rotpred_ffcv_imdecode"

# The crop arguments are not used: with them FFCV first transcodes the crop (tjTransform), which
# takes 1.4 times as long as decoding the whole image. If an image cannot be cut, setting its height
# to the crop's lower edge would save a sixth. But then libjpeg always warns of the remaining bytes,
# and damaged images could not be told from intact ones.
_imdecode: Any = types.ExternalFunction(
    IMDECODE,
    types.int32(
        types.uintp,  # JPEG bytes
        types.uint64,  # number of JPEG bytes
        types.uint32,  # height and width of the image
        types.uint32,
        types.uintp,  # output pixels
        types.uint32,  # height and width of the output
        types.uint32,
        types.uint32,  # offsets x and y: unused without the crop flag
        types.uint32,
        types.uint32,  # scale, numerator and denominator
        types.uint32,
        types.uint32,  # crop and flip flags: C bools, passed as whole words
        types.uint32,
    ),
)

OK, UNDECODABLE, DAMAGED = 0, 1, 2
"""Statuses: decoded; rejected by FFCV's decoder; bytes disagree with the side file."""
_JPEG = 0


class State(NamedTuple):
    """Arrays that the kernels read and write. Types and layouts are equal for all data sets."""

    data: Any
    """uint8 (bytes,): the beton."""
    offsets: Any
    """uint64 (N,): as `Beton.offsets`. The next four are also as in `Beton`."""
    sizes: Any
    heights: Any
    widths: Any
    modes: Any
    records: Any
    """(N,) of `segments.RECORD`."""
    lengths: Any
    """uint16 (segments,): as `Segments.lengths`."""
    boxes: Any
    """int32 (B, 5): crop boxes of the batch."""
    work_order: Any
    """int64 (B,): rows of the batch, the most expensive first."""
    status: Any
    """uint8 (B,), output: status of each sample."""
    spliced: Any
    """uint8 (lanes, bytes): buffer for a JPEG stream that is cut out of the stored one."""
    images: Any
    """uint8 (lanes, bytes): buffer for decoded pixels."""
    patches: Any
    """uint8 (lanes, bytes): buffer for crop boxes that extend beyond their images."""
    scratch: Any
    """uint32 (lanes, words): scratch memory of `resize_region`."""


@njit
def _work_index(n: Any, lane: Any, lanes: Any) -> Any:  # pragma: no cover - compiled
    """Return the index into `work_order` of the lane's n-th sample.

    Samples are dealt to lanes forwards, then backwards, so that all lanes have about equal cost.
    """
    return n * lanes + (lane if n % 2 == 0 else lanes - 1 - lane)


@njit
def _image(
    sample: Any, box: Any, state: State, lane: Any
) -> tuple[int, Any, Any, Any, Any, Any]:  # pragma: no cover - compiled
    """Decode the part of a sample that contains the crop box.

    Returns:
        Status; address of the pixels, their first row and column, height and width.
    """
    height, width = np.int64(state.heights[sample]), np.int64(state.widths[sample])
    start, size = np.int64(state.offsets[sample]), np.int64(state.sizes[sample])
    address = np.int64(state.data.ctypes.data) + start
    if state.modes[sample] != _JPEG:
        return OK, address, np.int64(0), np.int64(0), height, width
    spliced = state.spliced[lane]
    written, y0, x0, height, width = splice(
        state.data, start, size, state.records[sample], state.lengths, height, width, box, spliced
    )
    if written < 0:
        return DAMAGED, address, y0, x0, height, width
    if written > 0:
        address, size = np.int64(spliced.ctypes.data), written
    pixels = np.int64(state.images[lane].ctypes.data)
    code = _imdecode(address, size, height, width, pixels, height, width, 0, 0, 1, 1, 0, 0)
    return OK if code == 0 else UNDECODABLE, pixels, y0, x0, height, width


@njit
def copy_box(
    image: Any, height: Any, width: Any, top: Any, left: Any, out: Any, rows: Any, columns: Any
) -> None:  # pragma: no cover - compiled
    """Copy a crop box out of an image. The part outside the image is black.

    Args:
        image: Address of the image, uint8 (height, width, 3).
        height: Height of the image.
        width: Width of the image.
        top: Top of the crop box.
        left: Left edge of the crop box.
        out: Address of the output, uint8 (rows, columns, 3).
        rows: Height of the crop box.
        columns: Width of the crop box.
    """
    y0, y1 = max(top, 0), min(top + rows, height)
    x0, x1 = max(left, 0), min(left + columns, width)
    if y1 - y0 < rows or x1 - x0 < columns:
        clear_bytes(out, 3 * rows * columns)
    if x1 > x0:
        for y in range(y0, y1):
            to = out + 3 * ((y - top) * columns + x0 - left)
            copy_bytes(to, image + 3 * (y * width + x0), 3 * (x1 - x0))


@njit
def decode_lane(
    indices: Any, out: Any, offsets: Any, side: int, state: State, lane: int, lanes: int
) -> None:  # pragma: no cover - compiled
    """Decode and crop one lane's share of a batch; resize and flip it, or leave that to the device.

    One function does both, because compiling takes seconds. Lanes may run in parallel.

    Args:
        indices: int64 (B,), samples of the batch.
        out: uint8 (bytes,), output: crop i, (side, side, 3), starts at offsets[i]. Black if the
            sample cannot be decoded.
        offsets: int64 (B,), start of each crop in `out`.
        side: Side of the crops. 0 writes the crop boxes, (h, w, 3), neither resized nor flipped.
        state: Tables, crop boxes of this batch, and buffers.
        lane: 0 <= lane < lanes. Each lane has its own buffers in `state`.
        lanes: Number of lanes that share the batch.
    """
    base = np.int64(out.ctypes.data)
    for n in range((len(indices) + lanes - 1) // lanes):
        turn = _work_index(n, lane, lanes)
        if turn >= len(indices):
            continue
        i = state.work_order[turn]
        box = state.boxes[i]
        status, image, y0, x0, height, width = _image(indices[i], box, state, lane)
        state.status[i] = status
        top, left = np.int64(box[0]) - y0, np.int64(box[1]) - x0
        rows, columns = np.int64(box[2]), np.int64(box[3])
        target = base + offsets[i]
        if status != OK:
            # Clear the buffer: it still holds an earlier image.
            clear_bytes(target, 3 * (side * side if side else rows * columns))
            continue
        if side == 0:
            copy_box(image, height, width, top, left, target, rows, columns)
            continue
        if top < 0 or left < 0 or top + rows > height or left + columns > width:
            patch = np.int64(state.patches[lane].ctypes.data)
            copy_box(image, height, width, top, left, patch, rows, columns)
            image, top, left, width = patch, np.int64(0), np.int64(0), columns
        first, stride = image + 3 * (top * width + left), 3 * width
        flip = box[4] != 0
        resize_region(first, stride, rows, columns, target, side, flip, state.scratch[lane])
