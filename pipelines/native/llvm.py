"""Numba intrinsics: raw memory access and SIMD vectors in LLVM IR."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils as _cgutils
from numba.extending import intrinsic

cgutils: Any = _cgutils
"""numba's helpers for generating LLVM IR; numba does not annotate them."""

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def shuffle(builder: Any, a: Any, b: Any, indices: list[int]) -> Any:
    """Build a vector from the elements of a followed by b, at the given indices."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(indices)), indices))


def load(builder: Any, address: Any, kind: Any) -> Any:
    """Load a value of the LLVM type `kind` from an address of any alignment."""
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return value


def store(builder: Any, value: Any, address: Any) -> None:
    """Store a value at an address of any alignment."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """Build a vector of `lanes` equal elements."""
    single = ir.VectorType(value.type, 1)
    vector = builder.insert_element(ir.Constant(single, ir.Undefined), value, I32(0))
    return shuffle(builder, vector, vector, [0] * lanes)


def _get_byte(_typing: Any, address: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.zext(load(builder, values[0], I8), I64)

    return types.int64(address), generate


def _set_byte(_typing: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        store(builder, builder.trunc(values[1], I8), values[0])
        return context.get_dummy_value()

    return types.void(address, value), generate


def _copy_bytes(_typing: Any, to: Any, source: Any, count: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        pointers = [builder.inttoptr(value, I8.as_pointer()) for value in values[:2]]
        cgutils.raw_memcpy(builder, *pointers, values[2], I64(1))
        return context.get_dummy_value()

    return types.void(to, source, count), generate


def _clear_bytes(_typing: Any, to: Any, count: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        cgutils.memset(builder, builder.inttoptr(values[0], I8.as_pointer()), values[1], I8(0))
        return context.get_dummy_value()

    return types.void(to, count), generate


def _load_bits(_typing: Any, address: Any, bit: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        base, bit = values
        word = load(builder, builder.add(base, builder.lshr(bit, I64(3))), I64)
        return builder.shl(builder.bswap(word), builder.and_(bit, I64(7)))

    return types.uint64(address, bit), generate


# Intrinsics for compiled functions. All arguments are 64-bit integers; nothing is checked.
get_byte: Any = intrinsic(_get_byte)
"""get_byte(address): returns the byte as int64."""
set_byte: Any = intrinsic(_set_byte)
"""set_byte(address, value): writes the low 8 bits of value."""
copy_bytes: Any = intrinsic(_copy_bytes)
"""copy_bytes(to, source, count): copies between addresses; the ranges must not overlap."""
clear_bytes: Any = intrinsic(_clear_bytes)
"""clear_bytes(to, count): writes zeros."""
load_bits: Any = intrinsic(_load_bits)
"""load_bits(address, bit): returns uint64 whose top 57 or more bits are those from `bit` on; reads
the 8 bytes that start with the byte of `bit`."""
