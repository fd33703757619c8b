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
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_ONE = 65536  # a weight of one
_HALF = 128  # half a grey level in 8.8 bits
_GROUP = 4  # outputs whose taps lie together in a table
_build: Any = cgutils  # carries no types


@njit(nogil=True, cache=True, error_model="numpy")
def _tap_count(extent: int, side: int) -> int:  # pragma: no cover - compiled
    """Most source pixels under the filter at any place."""
    return min(extent, int(np.ceil(2.0 * max(extent / side, 1.0))))


@njit(nogil=True, cache=True, error_model="numpy")
def scratch_size(height: int, width: int, side: int) -> int:  # pragma: no cover - compiled
    """Bytes that are enough for `resample` with regions up to height x width, outputs up to side.

    A table has at most 4 * extent + 2 * entries weights: a smaller output has fewer entries, but
    more taps for each.
    """
    entries = (side + _GROUP - 1) // _GROUP * _GROUP
    return 32 * width + 8 * entries + 16 * (height + width + entries)


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


_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_LANES = ir.VectorType(_I16, 16)
_BYTES = ir.VectorType(_I8, 16)
_ZERO = ir.Constant(_BYTES, [0] * 16)


def _shuffle(builder: Any, a: Any, b: Any, places: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(places)), places))


def _load(builder: Any, address: Any, kind: Any) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return value


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    single = ir.VectorType(value.type, 1)
    vector = builder.insert_element(ir.Constant(single, ir.Undefined), value, _I32(0))
    return _shuffle(builder, vector, vector, [0] * lanes)


def _accumulate(builder: Any, total: Any, pixels: Any, address: Any) -> Any:
    """total + (pixels * weight >> 16), saturated; the 32 bits at address hold the weight twice."""
    wide = ir.VectorType(_I32, 16)
    pair = _splat(builder, _load(builder, address, _I32), 8)
    weight = builder.zext(builder.bitcast(pair, _LANES), wide)
    product = builder.lshr(
        builder.mul(builder.zext(pixels, wide), weight), ir.Constant(wide, [16] * 16)
    )
    kind = ir.FunctionType(_LANES, [_LANES, _LANES])
    add = _build.get_or_insert_function(builder.module, kind, "llvm.uadd.sat.v16i16")
    return builder.call(add, [total, builder.trunc(product, _LANES)])


def _sums(builder: Any, taps: Any, first: Any, step: Any) -> list[Any]:
    """Four accumulators run over the taps: step(tap, i) gives pixels and the weight's address."""
    start = _splat(builder, builder.trunc(first, _I16), 16)
    places = [_build.alloca_once_value(builder, start) for _ in range(_GROUP)]
    for place in places:
        builder.store(start, place)
    with _build.for_range(builder, taps, intp=_I64) as loop:
        for i, place in enumerate(places):
            pixels, weight = step(loop.index, i)
            builder.store(_accumulate(builder, builder.load(place), pixels, weight), place)
    return [builder.load(place) for place in places]


def _weight_address(builder: Any, table: Any, tap: Any, i: int) -> Any:
    return builder.add(table, builder.add(builder.shl(tap, _I64(4)), _I64(4 * i)))


def _row_block(skip: int) -> Any:
    """Make a function for pixels that begin `skip` bytes behind the given addresses.

    It filters four pixels of four output rows down the columns. Its arguments, all int64 in one
    tuple: addresses of the four rows' first taps, bytes from tap to tap, taps, address of their
    weights, value to start from, address of the result. It reads 16 bytes of each tap, and writes
    four pixels of four rows of four channels, uint16 in 8.8 bits; the fourth channel is padding.
    """

    def block(_typing: Any, arguments: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            *rows, stride, taps, table, first, out = _build.unpack_tuple(builder, values[0])
            bytes_in = [skip + 3 * pixel + channel for pixel in range(4) for channel in range(3)]
            places = [16] * 32  # zeros, but for the upper bytes of three lanes in four
            for i, byte in enumerate(bytes_in):
                places[i // 3 * 8 + i % 3 * 2 + 1] = byte

            def step(tap: Any, i: int) -> tuple[Any, Any]:
                address = builder.add(rows[i], builder.mul(tap, stride))
                pixels = _shuffle(builder, _load(builder, address, _BYTES), _ZERO, places)
                return builder.bitcast(pixels, _LANES), _weight_address(builder, table, tap, i)

            quads = ir.VectorType(_I64, 4)
            sums = [builder.bitcast(s, quads) for s in _sums(builder, taps, first, step)]
            even = [_shuffle(builder, sums[i], sums[i + 1], [0, 4, 2, 6]) for i in (0, 2)]
            odd = [_shuffle(builder, sums[i], sums[i + 1], [1, 5, 3, 7]) for i in (0, 2)]
            for pixel, (a, b) in enumerate((even, odd, even, odd)):
                at = pixel // 2 * 2
                turned = _shuffle(builder, a, b, [at, at + 1, at + 4, at + 5])
                _store(builder, turned, builder.add(out, _I64(32 * pixel)))
            return context.get_dummy_value()

        return types.void(arguments), generate

    return intrinsic(block)


_rows_from_0, _rows_from_4 = _row_block(0), _row_block(4)


def _column_block(_typing: Any, arguments: Any) -> Any:
    """Filter four output columns of four rows, and write them as bytes.

    Arguments, all int64 in one tuple: address of what `_row_block` wrote, of the four columns'
    first taps (int32), taps, address of their weights, value to start from, address of the first
    row's result, bytes from row to row. Writes 12 bytes of four rows.
    """

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        line, starts, taps, table, first, out, pitch = _build.unpack_tuple(builder, values[0])
        columns = []
        for i in range(4):
            start = _load(builder, builder.add(starts, _I64(4 * i)), _I32)
            columns.append(builder.add(line, builder.shl(builder.zext(start, _I64), _I64(5))))

        def step(tap: Any, i: int) -> tuple[Any, Any]:
            address = builder.add(columns[i], builder.shl(tap, _I64(5)))
            return _load(builder, address, _LANES), _weight_address(builder, table, tap, i)

        eight, words = ir.Constant(_LANES, [8] * 16), ir.VectorType(_I32, 4)
        sums = [
            builder.bitcast(builder.trunc(builder.lshr(s, eight), _BYTES), words)
            for s in _sums(builder, taps, first, step)
        ]
        upper = [_shuffle(builder, sums[i], sums[i + 1], [0, 4, 1, 5]) for i in (0, 2)]
        lower = [_shuffle(builder, sums[i], sums[i + 1], [2, 6, 3, 7]) for i in (0, 2)]
        rgb = [4 * pixel + channel for pixel in range(4) for channel in range(3)]
        for row, (a, b) in enumerate((upper, upper, lower, lower)):
            at = row % 2 * 2
            turned = builder.bitcast(_shuffle(builder, a, b, [at, at + 1, at + 4, at + 5]), _BYTES)
            packed = _shuffle(builder, turned, turned, rgb + [0] * 4)
            address = builder.add(out, builder.mul(pitch, _I64(row)))
            halves = builder.bitcast(packed, ir.VectorType(_I64, 2))
            _store(builder, builder.extract_element(halves, _I32(0)), address)
            rest = builder.extract_element(builder.bitcast(packed, words), _I32(2))
            _store(builder, rest, builder.add(address, _I64(8)))
        return context.get_dummy_value()

    return types.void(arguments), generate


_columns: Any = intrinsic(_column_block)


@njit(nogil=True, cache=True, error_model="numpy")
def _resample_blocks(
    source: Any, out: Any, rows: Any, row_weights: Any, columns: Any, column_weights: Any, line: Any
) -> None:  # pragma: no cover - compiled
    """As `_resample_plain`, four outputs of four rows at a time."""
    width, side = source.shape[1], out.shape[0]
    row_taps, column_taps = row_weights.shape[1], column_weights.shape[1]
    stride, pitch = source.strides[0], 3 * side
    begin, middle, end = source.ctypes.data, line.ctypes.data, out.ctypes.data
    for entry in range(0, len(rows), _GROUP):
        y = min(entry, side - _GROUP)
        weights = row_weights.ctypes.data + 4 * entry * row_taps
        a = begin + rows[entry] * stride
        b = begin + rows[entry + 1] * stride
        c = begin + rows[entry + 2] * stride
        d = begin + rows[entry + 3] * stride
        rest = (stride, row_taps, weights, row_taps // 2)
        _rows_from_0((a, b, c, d, *rest, middle))
        for pixel in range(4, width + 3, 4):
            # The 16 bytes of the last block end with the row: they begin before its first pixel.
            x = 3 * min(pixel, width - 4)
            _rows_from_4((a + x - 4, b + x - 4, c + x - 4, d + x - 4, *rest, middle + 32 * x // 3))
        for at in range(0, len(columns), _GROUP):
            _columns(
                (
                    middle, columns.ctypes.data + 4 * at, column_taps,
                    column_weights.ctypes.data + 4 * at * column_taps, column_taps // 2 + _HALF,
                    end + y * pitch + 3 * min(at, side - _GROUP), pitch,
                )
            )  # fmt: skip


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
    if width < 6 or side < _GROUP:
        _resample_plain(region, out, rows, row_weights, columns, column_weights, line)
    else:
        _resample_blocks(region, out, rows, row_weights, columns, column_weights, line)
