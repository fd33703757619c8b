"""What numba's Python lacks: memory by address, and vectors in LLVM's own language."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

build: Any = cgutils
"""numba's helpers for LLVM; they carry no types."""

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def shuffle(builder: Any, a: Any, b: Any, places: list[int]) -> Any:
    """The elements of two vectors, counted through, at some places."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(places)), places))


def load(builder: Any, address: Any, kind: Any) -> Any:
    """A value of some LLVM type at any address."""
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return value


def store(builder: Any, value: Any, address: Any) -> None:
    """Write a value to any address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """A vector of equal elements."""
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
        build.raw_memcpy(builder, *pointers, values[2], I64(1))
        return context.get_dummy_value()

    return types.void(to, source, count), generate


def _clear_bytes(_typing: Any, to: Any, count: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        build.memset(builder, builder.inttoptr(values[0], I8.as_pointer()), values[1], I8(0))
        return context.get_dummy_value()

    return types.void(to, count), generate


def _load_bits(_typing: Any, address: Any, bit: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        place, bit = values
        word = load(builder, builder.add(place, builder.lshr(bit, I64(3))), I64)
        return builder.shl(builder.bswap(word), builder.and_(bit, I64(7)))

    return types.uint64(address, bit), generate


# For compiled functions: all arguments are 64-bit integers, and nothing is checked.
get_byte: Any = intrinsic(_get_byte)
"""get_byte(address): the byte there, as int64."""
set_byte: Any = intrinsic(_set_byte)
"""set_byte(address, value)."""
copy_bytes: Any = intrinsic(_copy_bytes)
"""copy_bytes(to, source, count): addresses of what does not overlap."""
clear_bytes: Any = intrinsic(_clear_bytes)
"""clear_bytes(to, count): zeros."""
load_bits: Any = intrinsic(_load_bits)
"""load_bits(address, bit), uint64: at least 57 bits from a place on, at the top of a word; reads
the 8 bytes that begin with the bit's own."""
