"""SIMD inner loops of `pipelines.imaging.resize`: blocks of four outputs in four rows.

They work on addresses and LLVM vectors, as in `pipelines.native.llvm`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipelines.native.llvm import I8, I16, I32, I64, cgutils, load, shuffle, splat, store

GROUP = 4
"""Number of outputs whose taps are stored together in a table."""

_LANES = ir.VectorType(I16, 16)
_BYTES = ir.VectorType(I8, 16)
_ZERO = ir.Constant(_BYTES, [0] * 16)


def _accumulate(builder: Any, total: Any, pixels: Any, address: Any) -> Any:
    """Saturated total + (pixels * weight >> 16); the 32 bits at address hold the weight twice."""
    wide = ir.VectorType(I32, 16)
    pair = splat(builder, load(builder, address, I32), 8)
    weight = builder.zext(builder.bitcast(pair, _LANES), wide)
    product = builder.lshr(
        builder.mul(builder.zext(pixels, wide), weight), ir.Constant(wide, [16] * 16)
    )
    kind = ir.FunctionType(_LANES, [_LANES, _LANES])
    add = cgutils.get_or_insert_function(builder.module, kind, "llvm.uadd.sat.v16i16")
    return builder.call(add, [total, builder.trunc(product, _LANES)])


def _sums(builder: Any, taps: Any, first: Any, step: Any) -> list[Any]:
    """Sum over taps in four accumulators; step(tap, i) returns pixels and the weight's address."""
    start = splat(builder, builder.trunc(first, I16), 16)
    slots = [cgutils.alloca_once_value(builder, start) for _ in range(GROUP)]
    for slot in slots:
        builder.store(start, slot)
    with cgutils.for_range(builder, taps, intp=I64) as loop:
        for i, slot in enumerate(slots):
            pixels, weight = step(loop.index, i)
            builder.store(_accumulate(builder, builder.load(slot), pixels, weight), slot)
    return [builder.load(slot) for slot in slots]


def _weight_address(builder: Any, table: Any, tap: Any, i: int) -> Any:
    return builder.add(table, builder.add(builder.shl(tap, I64(4)), I64(4 * i)))


def _row_block(skip: int) -> Any:
    """Make an intrinsic for pixels that start `skip` bytes after the given addresses.

    It filters four pixels of four output rows vertically. Its arguments, all int64 in one tuple:
    addresses of the four rows' first taps, bytes from tap to tap, number of taps, address of their
    weights, initial value, address of the result. It reads 16 bytes per tap. It writes four pixels
    of four rows of four channels, uint16 in 8.8 bits; the fourth channel is padding.
    """

    def block(_typing: Any, arguments: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            *rows, stride, taps, table, first, out = cgutils.unpack_tuple(builder, values[0])
            bytes_in = [skip + 3 * pixel + channel for pixel in range(4) for channel in range(3)]
            indices = [16] * 32  # zeros, except for the upper bytes of three lanes in four
            for i, byte in enumerate(bytes_in):
                indices[i // 3 * 8 + i % 3 * 2 + 1] = byte

            def step(tap: Any, i: int) -> tuple[Any, Any]:
                address = builder.add(rows[i], builder.mul(tap, stride))
                pixels = shuffle(builder, load(builder, address, _BYTES), _ZERO, indices)
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


filter_rows, filter_rows_skip4 = _row_block(0), _row_block(4)


def _column_block(_typing: Any, arguments: Any) -> Any:
    """Filter four output columns of four rows horizontally, and write them as bytes.

    Arguments, all int64 in one tuple: address of the result of `_row_block`, address of the four
    columns' first taps (int32), number of taps, address of their weights, initial value, address of
    the first row's result, bytes from row to row. Writes 12 bytes in each of four rows.
    """

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        line, starts, taps, table, first, out, pitch = cgutils.unpack_tuple(builder, values[0])
        addresses = []
        for i in range(4):
            start = load(builder, builder.add(starts, I64(4 * i)), I32)
            addresses.append(builder.add(line, builder.shl(builder.zext(start, I64), I64(5))))

        def step(tap: Any, i: int) -> tuple[Any, Any]:
            address = builder.add(addresses[i], builder.shl(tap, I64(5)))
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


filter_columns: Any = intrinsic(_column_block)
