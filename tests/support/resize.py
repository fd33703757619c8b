"""The resize kernel called with NumPy arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipelines.imaging.resize import resize_region

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]


def resize_into(
    source: Pixels, box: Box, out: Pixels, flip: bool, scratch: npt.NDArray[np.uint32]
) -> None:
    """Call `resize_region` on a box of (H, W, 3), adjacent pixels in a row, into (S, S, 3)."""
    top, left, height, width = box
    assert source.strides[1:] == (3, 1) and out.flags.c_contiguous
    assert 0 <= top <= top + height <= source.shape[0]
    assert 0 <= left <= left + width <= source.shape[1]
    first, stride = source.ctypes.data + top * source.strides[0] + 3 * left, source.strides[0]
    resize_region(first, stride, height, width, out.ctypes.data, out.shape[0], flip, scratch)
