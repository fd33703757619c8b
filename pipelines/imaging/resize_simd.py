"""The inner loops of `pipelines.imaging.resize`, for four outputs of four rows at a time.

Addresses and vectors, as in `pipelines.native.llvm`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipelines.native.llvm import I8, I16, I32, I64, build, load, shuffle, splat, store

GROUP = 4
"""Outputs whose taps lie together in a table."""

_LANES = ir.VectorType(I16, 16)
_BYTES = ir.VectorType(I8, 16)
_ZERO = ir.Constant(_BYTES, [0] * 16)


def _accumulate(builder: Any, total: Any, pixels: Any, address: Any) -> Any:
    """total + (pixels * weight >> 16), saturated; the 32 bits at address hold the weight twice."""
    wide = ir.VectorType(I32, 16)
    pair = splat(builder, load(builder, address, I32), 8)
    weight = builder.zext(builder.bitcast(pair, _LANES), wide)
    product = builder.lshr(
        builder.mul(builder.zext(pixels, wide), weight), ir.Constant(wide, [16] * 16)
    )
    kind = ir.FunctionType(_LANES, [_LANES, _LANES])
    add = build.get_or_insert_function(builder.module, kind, "llvm.uadd.sat.v16i16")
    return builder.call(add, [total, builder.trunc(product, _LANES)])


def _sums(builder: Any, taps: Any, first: Any, step: Any) -> list[Any]:
    """Four accumulators run over the taps: step(tap, i) gives pixels and the weight's address."""
    start = splat(builder, builder.trunc(first, I16), 16)
    places = [build.alloca_once_value(builder, start) for _ in range(GROUP)]
    for place in places:
        builder.store(start, place)
    with build.for_range(builder, taps, intp=I64) as loop:
        for i, place in enumerate(places):
            pixels, weight = step(loop.index, i)
            builder.store(_accumulate(builder, builder.load(place), pixels, weight), place)
    return [builder.load(place) for place in places]


def _weight_address(builder: Any, table: Any, tap: Any, i: int) -> Any:
    return builder.add(table, builder.add(builder.shl(tap, I64(4)), I64(4 * i)))


def _row_block(skip: int) -> Any:
    """Make a function for pixels that begin `skip` bytes behind the given addresses.

    It filters four pixels of four output rows down the columns. Its arguments, all int64 in one
    tuple: addresses of the four rows' first taps, bytes from tap to tap, taps, address of their
    weights, value to start from, address of the result. It reads 16 bytes of each tap, and writes
    four pixels of four rows of four channels, uint16 in 8.8 bits; the fourth channel is padding.
    """

    def block(_typing: Any, arguments: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            *rows, stride, taps, table, first, out = build.unpack_tuple(builder, values[0])
            bytes_in = [skip + 3 * pixel + channel for pixel in range(4) for channel in range(3)]
            places = [16] * 32  # zeros, but for the upper bytes of three lanes in four
            for i, byte in enumerate(bytes_in):
                places[i // 3 * 8 + i % 3 * 2 + 1] = byte

            def step(tap: Any, i: int) -> tuple[Any, Any]:
                address = builder.add(rows[i], builder.mul(tap, stride))
                pixels = shuffle(builder, load(builder, address, _BYTES), _ZERO, places)
                return builder.bitcast(pixels, _LANES), _weight_address(builder, table, tap, i)

            quads = ir.VectorType(I64, 4)
            sums = [builder.bitcast(s, quads) for s in _sums(builder, taps, first, step)]
            even = [shuffle(builder, sums[i], sums[i + 1], [0, 4, 2, 6]) for i in (0, 2)]
            odd = [shuffle(builder, sums[i], sums[i + 1], [1, 5, 3, 7]) for i in (0, 2)]
            for pixel, (a, b) in enumerate((even, odd, even, odd)):
                at = pixel // 2 * 2
                turned = shuffle(builder, a, b, [at, at + 1, at + 4, at + 5])
                store(builder, turned, builder.add(out, I64(32 * pixel)))
            return context.get_dummy_value()

        return types.void(arguments), generate

    return intrinsic(block)


rows_from_0, rows_from_4 = _row_block(0), _row_block(4)


def _column_block(_typing: Any, arguments: Any) -> Any:
    """Filter four output columns of four rows, and write them as bytes.

    Arguments, all int64 in one tuple: address of what `_row_block` wrote, of the four columns'
    first taps (int32), taps, address of their weights, value to start from, address of the first
    row's result, bytes from row to row. Writes 12 bytes of four rows.
    """

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        line, starts, taps, table, first, out, pitch = build.unpack_tuple(builder, values[0])
        places = []
        for i in range(4):
            start = load(builder, builder.add(starts, I64(4 * i)), I32)
            places.append(builder.add(line, builder.shl(builder.zext(start, I64), I64(5))))

        def step(tap: Any, i: int) -> tuple[Any, Any]:
            address = builder.add(places[i], builder.shl(tap, I64(5)))
            return load(builder, address, _LANES), _weight_address(builder, table, tap, i)

        eight, words = ir.Constant(_LANES, [8] * 16), ir.VectorType(I32, 4)
        sums = [
            builder.bitcast(builder.trunc(builder.lshr(s, eight), _BYTES), words)
            for s in _sums(builder, taps, first, step)
        ]
        upper = [shuffle(builder, sums[i], sums[i + 1], [0, 4, 1, 5]) for i in (0, 2)]
        lower = [shuffle(builder, sums[i], sums[i + 1], [2, 6, 3, 7]) for i in (0, 2)]
        rgb = [4 * pixel + channel for pixel in range(4) for channel in range(3)]
        for row, (a, b) in enumerate((upper, upper, lower, lower)):
            at = row % 2 * 2
            turned = builder.bitcast(shuffle(builder, a, b, [at, at + 1, at + 4, at + 5]), _BYTES)
            packed = shuffle(builder, turned, turned, rgb + [0] * 4)
            address = builder.add(out, builder.mul(pitch, I64(row)))
            halves = builder.bitcast(packed, ir.VectorType(I64, 2))
            store(builder, builder.extract_element(halves, I32(0)), address)
            rest = builder.extract_element(builder.bitcast(packed, words), I32(2))
            store(builder, rest, builder.add(address, I64(8)))
        return context.get_dummy_value()

    return types.void(arguments), generate


four_columns: Any = intrinsic(_column_block)
