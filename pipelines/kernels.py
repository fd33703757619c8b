"""Compiled inner loop of the FFCV engine.

A module-level function with `cache=True`: numba keeps its machine code on disk, which it cannot do
for the code that FFCV generates around it. The two C functions of FFCV's library are called by
symbol name; `pipelines.ffcv` gives the names their addresses before the first call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange, types

IMDECODE = "rotpred_ffcv_imdecode"
RESIZE = "rotpred_ffcv_resize"

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
_resize: Any = types.ExternalFunction(RESIZE, types.void(*[types.int64] * 11))

OK, UNDECODABLE = 0, 1
_JPEG = 0


@njit(nogil=True, cache=True, error_model="numpy")
def _crop_into(picture: Any, box: Any, patch: Any, out: Any) -> None:  # pragma: no cover - compiled
    """Cut box out of picture (H, W, 3), black outside, resize to out (S, S, 3), flip."""
    height, width = picture.shape[0], picture.shape[1]
    top, left, h, w = box[0], box[1], box[2], box[3]
    side = out.shape[0]
    inside = top >= 0 and left >= 0 and top + h <= height and left + w <= width
    source = picture
    if not inside:
        source = patch[: h * w * 3].reshape(h, w, 3)
        source[:] = 0
        y0, y1 = max(top, 0), min(top + h, height)
        x0, x1 = max(left, 0), min(left + w, width)
        if y1 > y0 and x1 > x0:
            source[y0 - top : y1 - top, x0 - left : x1 - left] = picture[y0:y1, x0:x1]
        top, left = 0, 0
    if h == side and w == side:
        out[:] = source[top : top + h, left : left + w]
    else:
        _resize(
            0, source.ctypes.data, source.shape[0], source.shape[1],
            top, top + h, left, left + w, out.ctypes.data, side, side,
        )  # fmt: skip
    if box[4]:
        for y in range(side):
            for x in range(side // 2):
                for c in range(3):
                    far = out[y, side - 1 - x, c]
                    out[y, side - 1 - x, c] = out[y, x, c]
                    out[y, x, c] = far


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def decode_crops(
    indices: Any, out: Any, state: Any, lanes: int
) -> None:  # pragma: no cover - compiled
    """Decode and crop a batch.

    Args:
        indices: int64 (B,).
        out: uint8 (B, S, S, 3); black where the sample could not be decoded.
        state: data (file bytes), offsets, sizes, heights, widths, modes of all samples, then boxes
            int32 (B, 5), status uint8 (B,) to be written, and per lane one decode buffer and one
            patch buffer.
        lanes: threads; each takes every lanes-th sample, with its own buffers.
    """
    data, offsets, sizes, heights, widths, modes, boxes, status, scratch, patches = state
    for lane in prange(lanes):
        for i in range(lane, len(indices), lanes):
            sample = indices[i]
            height, width = heights[sample], widths[sample]
            start = offsets[sample]
            pixels = np.int64(height) * np.int64(width) * 3
            status[i] = OK
            if modes[sample] == _JPEG:
                code = _imdecode(
                    data.ctypes.data + start, sizes[sample], height, width,
                    scratch[lane].ctypes.data, height, width, 0, 0, 1, 1, 0, 0,
                )  # fmt: skip
                if code != 0:
                    # The buffer still holds an earlier picture: it must not pass for this sample.
                    status[i] = UNDECODABLE
                    out[i] = 0
                    continue
                picture = scratch[lane, :pixels].reshape(height, width, 3)
            else:
                picture = data[start : start + np.uint64(pixels)].reshape(height, width, 3)
            _crop_into(picture, boxes[i], patches[lane], out[i])
