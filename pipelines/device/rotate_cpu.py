"""CPU kernel for rotation and normalisation: every pixel is read once and looked up in a table.

The lookup of a band of rows goes to a buffer that stays in the cache. From there it is written to
the four views: as rows for 0 and 180 degrees, and as columns of a few pixels for 90 and 270. The
threads are Python's, running GIL-free code: numba's threading layer does not allow concurrent use,
and FFCV uses it too.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipelines.batch import Regions
from pipelines.imaging.resize import resize_region, scratch_size
from pipelines.native.jit import njit
from pipelines.native.llvm import I32, I64, cgutils, load, shuffle, store
from pipelines.native.threads import LaneThreads
from pipelines.spec import Normalize

_BAND = 16  # rows; at 224 pixels the buffer takes 28 KB, or 56 KB for float32
_WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

# The intrinsics below take a tuple of int64 addresses. The type of its last element sets the word
# size. A pixel in the buffer is four words: three channels and a zero.


def _word(signature: Any) -> Any:
    return ir.IntType(signature.args[0][-1].bitwidth)


def _put_pixel_ir(_typing: Any, arguments: Any) -> Any:
    """Combine the table entries at three addresses, and store the pixel at a fourth."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        *entries, out, _ = cgutils.unpack_tuple(builder, values[0])
        kind = ir.VectorType(_word(signature), 4)
        red, green, blue = (load(builder, entry, kind) for entry in entries)
        store(builder, builder.or_(builder.or_(red, green), blue), out)
        return context.get_dummy_value()

    return types.void(arguments), generate


def _copy_four_ir(_typing: Any, arguments: Any) -> Any:
    """Copy four pixels, `step` bytes apart, without their zeros: 12 words."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        source, step, out, _ = cgutils.unpack_tuple(builder, values[0])
        word = _word(signature)
        addresses = [builder.add(source, builder.mul(step, I64(i))) for i in range(4)]
        a, b, c, d = (load(builder, address, ir.VectorType(word, 4)) for address in addresses)
        low, high = (shuffle(builder, *pair, list(range(8))) for pair in ((a, b), (c, d)))
        indices = [i for i in range(16) if i % 4 < 3]
        store(builder, shuffle(builder, low, high, indices[:8]), out)
        rest = shuffle(builder, low, high, indices[8:])
        store(builder, rest, builder.add(out, I64(word.width)))  # 8 words of width / 8 bytes
        return context.get_dummy_value()

    return types.void(arguments), generate


def _copy_one_ir(_typing: Any, arguments: Any) -> Any:
    """Copy one pixel without its zero: 3 words."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        source, out, _ = cgutils.unpack_tuple(builder, values[0])
        word = _word(signature)
        pixel = load(builder, source, ir.VectorType(word, 4))
        store(builder, shuffle(builder, pixel, pixel, [0, 1]), out)
        blue = builder.extract_element(pixel, I32(2))
        store(builder, blue, builder.add(out, I64(word.width // 4)))
        return context.get_dummy_value()

    return types.void(arguments), generate


_put_pixel: Any = intrinsic(_put_pixel_ir)
_copy_four: Any = intrinsic(_copy_four_ir)
_copy_one: Any = intrinsic(_copy_one_ir)


@njit
def _copy_row(source: Any, step: Any, out: Any, count: Any, size: Any, word: Any) -> None:
    """Copy `count` pixels, `step` bytes apart, to contiguous memory."""
    for i in range(0, count - 3, 4):
        _copy_four((source + i * step, step, out + i * 3 * size, word))
    for i in range(count // 4 * 4, count):
        _copy_one((source + i * step, out + i * 3 * size, word))


@njit
def _write_views(x: Any, out: Any, table: Any, buffer: Any) -> None:
    """Write the views of some crops.

    Args:
        x: uint8 (B, S, S, 3).
        out: int64 (V,), addresses of the first crop's views, words (S, S, 3), each followed by the
            next crop's; V is 1 or 4.
        table: Words (3, 256, 4), channel c of value v at [c, v, c], zeros elsewhere.
        buffer: Words (band, S, 4), owned by the caller: numba would free its own after the last use
            of its name, while the address is still in use.
    """
    side, size, word = x.shape[1], table.itemsize, table[0, 0, 3]
    wide, line = 4 * size, side * 3 * size  # bytes of a pixel in the buffer, of a row in a view
    band = len(buffer)
    begin = np.int64(buffer.ctypes.data)
    reds = np.int64(table.ctypes.data)
    greens, blues = reds + 256 * wide, reds + 512 * wide
    for i in range(len(x)):
        image = i * side * line
        for top in range(0, side, band):
            rows = min(band, side - top)
            for y in range(rows):
                for c in range(side):
                    red = reds + wide * x[i, top + y, c, 0]
                    green = greens + wide * x[i, top + y, c, 1]
                    blue = blues + wide * x[i, top + y, c, 2]
                    _put_pixel((red, green, blue, begin + wide * (y * side + c), word))
            upright = out[0] + image + top * line
            for y in range(rows):
                _copy_row(begin + y * side * wide, wide, upright + y * line, side, size, word)
            if len(out) == 1:
                continue
            bottom = begin + (rows - 1) * side * wide
            turned90 = out[1] + image + (side - 1) * line + top * 3 * size
            turned180 = out[2] + image + (side - top - rows) * line
            turned270 = out[3] + image + (side - top - rows) * 3 * size
            for y in range(rows):
                last = bottom + (side - 1 - y * side) * wide
                _copy_row(last, -wide, turned180 + y * line, side, size, word)
            for c in range(side):
                _copy_row(begin + c * wide, side * wide, turned90 - c * line, rows, size, word)
                _copy_row(bottom + c * wide, -side * wide, turned270 + c * line, rows, size, word)


@njit
def _resize(pixels: Any, offsets: Any, shapes: Any, flips: Any, out: Any, scratch: Any) -> None:
    """Resize regions, given by the fields of `Regions`, into out, uint8 (B, S, S, 3)."""
    side = np.int64(out.shape[1])
    source, target = np.int64(pixels.ctypes.data), np.int64(out.ctypes.data)
    for i in range(len(out)):
        height, width = np.int64(shapes[i, 0]), np.int64(shapes[i, 1])
        at = target + 3 * side * side * i
        flip = flips[i] != 0
        resize_region(source + offsets[i], 3 * width, height, width, at, side, flip, scratch)


@functools.cache
def _table(normalize: Normalize, dtype: torch.dtype) -> torch.Tensor:
    """Normalised values as a table (3, 256, 4): channel c of value v at [c, v, c], else zeros."""
    mean, std = (torch.tensor(v, dtype=torch.float32) for v in (normalize.mean, normalize.std))
    values = torch.arange(256, dtype=torch.float32)[:, None]
    table = torch.zeros(3, 256, 4, dtype=dtype)
    for channel, column in enumerate(((values - mean) * (1.0 / std)).to(dtype).unbind(1)):
        table[channel, :, channel] = column
    return table


@functools.lru_cache(maxsize=2)
def _threads(threads: int) -> LaneThreads:
    return LaneThreads(threads, "rotate")


def _check(regions: Regions) -> None:
    """Raise `ValueError` if a region lies outside the pixels."""
    shapes = regions.shapes.long()
    ends = regions.offsets + shapes[:, 0] * shapes[:, 1] * 3
    wrong = (shapes < 1).any(1) | (regions.offsets < 0) | (ends > len(regions.pixels))
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"region {i} of {shapes[i].tolist()} pixels at byte {int(regions.offsets[i])} does not "
            f"lie inside the {len(regions.pixels)} bytes given"
        )


def write_views(images: torch.Tensor | Regions, out: torch.Tensor, *, normalize: Normalize) -> None:
    """Resize regions if given, rotate and normalise, on up to `torch.get_num_threads()` threads.

    Args:
        images: uint8 (B, S, S, 3), or regions to be resized to S, on the CPU.
        out: Output (V, B, S, S, 3), contiguous, float32, bfloat16 or float16; V is 1 or 4.
        normalize: Mean and standard deviation per channel, in units of 0 to 255.

    Raises:
        ValueError: A region does not lie inside its pixels.
    """
    if isinstance(images, Regions):
        _check(images)
    batch, side = out.shape[1:3]
    words = _WORDS[out.dtype]
    views, table = out.view(words).numpy(), _table(normalize, out.dtype).view(words).numpy()

    def work(part: slice) -> None:
        if isinstance(images, Regions):
            crops = np.empty((part.stop - part.start, side, side, 3), np.uint8)
            offsets, shapes = images.offsets[part].numpy(), images.shapes[part].numpy()
            tallest, widest = shapes.max(axis=0).tolist()
            scratch = np.empty(scratch_size(tallest, widest, side), np.uint32)
            flips = images.flips[part].numpy()
            _resize(images.pixels.numpy(), offsets, shapes, flips, crops, scratch)
        else:
            crops = images[part].numpy()
        buffer = np.empty((_BAND, side, 4), views.dtype)
        # Addresses, because slices are of another array type and would be compiled again.
        addresses = np.array([view[part.start].ctypes.data for view in views], np.int64)
        _write_views(crops, addresses, table, buffer)

    threads = min(torch.get_num_threads(), batch)
    bounds = [batch * i // max(threads, 1) for i in range(threads + 1)]
    parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
    if parts:
        _threads(threads).run(lambda lane: work(parts[lane]), threads)
