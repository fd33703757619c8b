"""Compiled inner loops of the FFCV engine.

Module-level functions with `cache=True`: numba keeps their machine code on disk, which it cannot do
for the code that FFCV generates around them. FFCV's decoder is called by symbol name;
`pipelines.ffcv_loader` gives the name its address before the first call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange, types

from pipelines.resample import resample
from pipelines.splice import splice

IMDECODE = "rotpred_ffcv_imdecode"

# Its crop arguments stay unused: with them it first transcodes the crop (tjTransform), which takes
# 1.4 times as long as decoding the whole picture. Where a picture cannot be cut, setting its height
# to the crop's lower edge would save a sixth; but then libjpeg always warns of the bytes behind,
# and damage could no longer be told from health.
_imdecode: Any = types.ExternalFunction(
    IMDECODE,
    types.int32(
        types.uintp,  # JPEG bytes
        types.uint64,  # their number
        types.uint32,  # height and width of the picture
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
    pictures: Any
    """uint8 (lanes, bytes): its pixels."""
    patches: Any
    """uint8 (lanes, bytes): boxes that stick out of their pictures."""
    scratch: Any
    """uint8 (lanes, bytes): for `resample`."""


@njit(nogil=True, cache=True, error_model="numpy")
def _turn(n: Any, lane: Any, lanes: Any) -> Any:  # pragma: no cover - compiled
    """Place in `turns` of a lane's n-th sample: forwards, backwards, ... so that all end alike."""
    return n * lanes + (lane if n % 2 == 0 else lanes - 1 - lane)


@njit(nogil=True, cache=True, error_model="numpy")
def _picture(
    sample: Any, box: Any, state: State, lane: Any
) -> tuple[int, Any, Any, Any]:  # pragma: no cover - compiled
    """Status, pixels (h, w, 3) that hold the box, and their first row and column."""
    height, width = np.int64(state.heights[sample]), np.int64(state.widths[sample])
    start, size = np.int64(state.offsets[sample]), np.int64(state.sizes[sample])
    status, y0, x0 = OK, 0, 0
    picture = state.data[start : start + 1].reshape(1, 1, 1)
    if state.modes[sample] != _JPEG:
        picture = state.data[start : start + height * width * 3].reshape(height, width, 3)
        return status, picture, y0, x0
    spliced = state.spliced[lane]
    written, y0, x0, height, width = splice(
        state.data, start, size, state.records[sample], state.lengths, height, width, box, spliced
    )
    if written < 0:
        return DAMAGED, picture, 0, 0
    address = state.data.ctypes.data + start
    if written > 0:
        address, size = spliced.ctypes.data, written
    pixels = state.pictures[lane]
    code = _imdecode(
        address, size, height, width, pixels.ctypes.data, height, width, 0, 0, 1, 1, 0, 0
    )
    if code != 0:
        status = UNDECODABLE
    picture = pixels[: height * width * 3].reshape(height, width, 3)
    return status, picture, y0, x0


@njit(nogil=True, cache=True, error_model="numpy")
def cut(picture: Any, top: Any, left: Any, out: Any) -> None:  # pragma: no cover - compiled
    """Copy the box at (top, left) of picture (H, W, 3) to out (h, w, 3), black outside."""
    height, width = out.shape[0], out.shape[1]
    y0, y1 = max(top, 0), min(top + height, picture.shape[0])
    x0, x1 = max(left, 0), min(left + width, picture.shape[1])
    if y1 - y0 < height or x1 - x0 < width:
        out[:] = 0
    if y1 > y0 and x1 > x0:
        out[y0 - top : y1 - top, x0 - left : x1 - left] = picture[y0:y1, x0:x1]


@njit(nogil=True, cache=True, error_model="numpy")
def _crops_of_lane(
    indices: Any, out: Any, state: State, lane: Any, lanes: Any
) -> None:  # pragma: no cover - compiled
    for n in range((len(indices) + lanes - 1) // lanes):
        place = _turn(n, lane, lanes)
        if place >= len(indices):
            continue
        i = state.turns[place]
        box = state.boxes[i]
        status, picture, y0, x0 = _picture(indices[i], box, state, lane)
        state.status[i] = status
        if status != OK:
            # The buffer still holds an earlier picture: it must not pass for this sample.
            out[i] = 0
            continue
        top, left, h, w = box[0] - y0, box[1] - x0, box[2], box[3]
        if top < 0 or left < 0 or top + h > picture.shape[0] or left + w > picture.shape[1]:
            patch = state.patches[lane, : h * w * 3].reshape(h, w, 3)
            cut(picture, top, left, patch)
            picture, top, left = patch, 0, 0
        resample(picture, top, left, h, w, out[i], box[4] != 0, state.scratch[lane])


@njit(nogil=True, cache=True, error_model="numpy")
def _regions_of_lane(
    indices: Any, out: Any, offsets: Any, state: State, lane: Any, lanes: Any
) -> None:  # pragma: no cover - compiled
    for n in range((len(indices) + lanes - 1) // lanes):
        place = _turn(n, lane, lanes)
        if place >= len(indices):
            continue
        i = state.turns[place]
        box = state.boxes[i]
        h, w = box[2], box[3]
        target = out[offsets[i] : offsets[i] + h * w * 3].reshape(h, w, 3)
        status, picture, y0, x0 = _picture(indices[i], box, state, lane)
        state.status[i] = status
        if status != OK:
            target[:] = 0
            continue
        cut(picture, box[0] - y0, box[1] - x0, target)


# The loops over lanes hold a call and no more: numba compiles whatever stands in a parallel loop
# several times, and loses what it writes to members of a tuple.
@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def decode_crops(
    indices: Any, out: Any, state: State, lanes: int
) -> None:  # pragma: no cover - compiled
    """Decode, crop, resize and flip a batch.

    Args:
        indices: int64 (B,).
        out: uint8 (B, S, S, 3); black where the sample could not be decoded.
        state: with the boxes of this batch.
        lanes: threads, each with its own buffers.
    """
    for lane in prange(lanes):
        _crops_of_lane(indices, out, state, np.int64(lane), lanes)


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def decode_regions(
    indices: Any, out: Any, offsets: Any, state: State, lanes: int
) -> None:  # pragma: no cover - compiled
    """Decode a batch and cut its boxes, neither resized nor flipped.

    Args:
        indices: int64 (B,).
        out: uint8: region i, (h, w, 3), is written from offsets[i] on; black where the sample could
            not be decoded.
        offsets: int64 (B,).
        state: with the boxes of this batch.
        lanes: threads, each with its own buffers.
    """
    for lane in prange(lanes):
        _regions_of_lane(indices, out, offsets, state, np.int64(lane), lanes)
