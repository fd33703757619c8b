"""Compiled inner loops of the FFCV engine.

Module-level functions, whose machine code is kept on disk, which numba cannot do for the code that
FFCV generates around them. FFCV's decoder is called by symbol name; `pipelines.engines.ffcv.loader` gives
the name its address before the first call. Images are addresses: every layout of an array would
be compiled anew.
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

# Its crop arguments stay unused: with them it first transcodes the crop (tjTransform), which takes
# 1.4 times as long as decoding the whole image. Where an image cannot be cut, setting its height
# to the crop's lower edge would save a sixth; but then libjpeg always warns of the bytes behind,
# and damage could no longer be told from health.
_imdecode: Any = types.ExternalFunction(
    IMDECODE,
    types.int32(
        types.uintp,  # JPEG bytes
        types.uint64,  # their number
        types.uint32,  # height and width of the image
        types.uint32,
        types.uintp,  # output pixels
        types.uint32,  # height and width of the output
        types.uint32,
        types.uint32,  # offsets x and y: unused without the crop flag
        types.uint32,
        types.uint32,  # scale, numerator and denominator
        types.uint32,
        types.uint32,  # crop and flip flags: C bools, passed in whole words
        types.uint32,
    ),
)

OK, UNDECODABLE, DAMAGED = 0, 1, 2
"""Statuses: decoded; refused by FFCV's decoder; bytes that contradict the side file."""
_JPEG = 0


class State(NamedTuple):
    """What the kernels read and write. Types and layouts are the same for every data set."""

    data: Any
    """uint8: the beton's bytes."""
    offsets: Any
    """uint64 (N,), like the next five."""
    sizes: Any
    heights: Any
    widths: Any
    modes: Any
    records: Any
    """(N,) of `segments.RECORD`."""
    lengths: Any
    """uint16: as `Segments.lengths`."""
    boxes: Any
    """int32 (B, 5): of the batch."""
    turns: Any
    """int64 (B,): the batch's samples, the most expensive first."""
    status: Any
    """uint8 (B,): written."""
    spliced: Any
    """uint8 (lanes, bytes): the JPEG that is decoded, where it is cut out of the stored one."""
    images: Any
    """uint8 (lanes, bytes): its pixels."""
    patches: Any
    """uint8 (lanes, bytes): boxes that stick out of their images."""
    scratch: Any
    """uint32 (lanes, words): for `resize_region`."""


@njit
def _turn(n: Any, lane: Any, lanes: Any) -> Any:  # pragma: no cover - compiled
    """Place in `turns` of a lane's n-th sample: forwards, backwards, ... so that all end alike."""
    return n * lanes + (lane if n % 2 == 0 else lanes - 1 - lane)


@njit
def _image(
    sample: Any, box: Any, state: State, lane: Any
) -> tuple[int, Any, Any, Any, Any, Any]:  # pragma: no cover - compiled
    """Status, address of pixels that hold the box, their first row and column, height and width."""
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
def cut(
    image: Any, height: Any, width: Any, top: Any, left: Any, out: Any, rows: Any, columns: Any
) -> None:  # pragma: no cover - compiled
    """Copy a box of an image, black where it sticks out.

    Args:
        image: address of uint8 (height, width, 3).
        height, width: of it.
        top, left: of the box.
        out: address of uint8 (rows, columns, 3), to be written.
        rows, columns: of the box.
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

    One function for both, because compiling takes seconds. Lanes may run at the same time.

    Args:
        indices: int64 (B,).
        out: uint8: crop i, (side, side, 3), is written from offsets[i] on; black where the sample
            could not be decoded.
        offsets: int64 (B,).
        side: of the crops; 0 writes the boxes as they are, (h, w, 3), neither resized nor flipped.
        state: with the boxes of this batch.
        lane: 0 <= lane < lanes; each has its own buffers in `state`.
        lanes: among which the batch is shared.
    """
    base = np.int64(out.ctypes.data)
    for n in range((len(indices) + lanes - 1) // lanes):
        place = _turn(n, lane, lanes)
        if place >= len(indices):
            continue
        i = state.turns[place]
        box = state.boxes[i]
        status, image, y0, x0, height, width = _image(indices[i], box, state, lane)
        state.status[i] = status
        top, left = np.int64(box[0]) - y0, np.int64(box[1]) - x0
        rows, columns = np.int64(box[2]), np.int64(box[3])
        target = base + offsets[i]
        if status != OK:
            # The buffer still holds an earlier image: it must not pass for this sample.
            clear_bytes(target, 3 * (side * side if side else rows * columns))
            continue
        if side == 0:
            cut(image, height, width, top, left, target, rows, columns)
            continue
        if top < 0 or left < 0 or top + rows > height or left + columns > width:
            patch = np.int64(state.patches[lane].ctypes.data)
            cut(image, height, width, top, left, patch, rows, columns)
            image, top, left, width = patch, np.int64(0), np.int64(0), columns
        first, stride = image + 3 * (top * width + left), 3 * width
        flip = box[4] != 0
        resize_region(first, stride, rows, columns, target, side, flip, state.scratch[lane])
