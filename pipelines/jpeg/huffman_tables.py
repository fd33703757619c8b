"""Look-up tables for the Huffman codes of a baseline JPEG. ITU-T T.81, annexes B, C and F."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from pipelines.native.jit import njit

LOOK: Final = 11
"""Bits looked up at once: the tables of an image stay in the first-level cache."""
SIZE: Final = 1 << LOOK
_EOB: Final = 1 << 13


@njit
def read_tables(data: Any, bounds: Any, counts: Any, symbols: Any) -> bool:
    """Take all Huffman tables from DHT segments; later ones replace earlier ones.

    Args:
        data: (bytes,) of the stream.
        bounds: (n, 2): where the segments' bodies begin and end.
        counts: (8, 17) out: codes of each length; the row is 4 * class + number.
        symbols: (8, 256) out: what they stand for.
    """
    for n in range(len(bounds)):
        pos, stop = bounds[n, 0], bounds[n, 1]
        while pos < stop:
            kind = data[pos]
            if pos + 17 > stop or kind & 0xEC:
                return False
            slot, total = 4 * (kind >> 4) + (kind & 3), 0
            for length in range(1, 17):
                counts[slot, length] = data[pos + length]
                total += data[pos + length]
            pos += 17
            if total > 256 or pos + total > stop:
                return False
            for k in range(total):
                symbols[slot, k] = data[pos + k]
            pos += total
    return True


@njit
def build(
    counts: Any, symbols: Any, slot: Any, single: Any, lengths: Any, limits: Any, base: Any
) -> bool:
    """Make the look-up of one table; False where its codes are impossible.

    Args:
        counts: (8, 17) codes of each length.
        symbols: (8, 256).
        slot: Row of the table; the symbols of the first four are sizes of DC differences.
        single: (8, SIZE) zeros, out, by the next bits: bits of code and value (5 bits), what the
            symbol adds to the coefficient's index (8), end of block (1). DC: bits of the code (5),
            size. 0 where the code is longer than `LOOK`, or is none.
        lengths: (8, SIZE) zeros, out: bits of the code alone.
        limits: (8, 17) out: first 16 bits that are no code of at most this length.
        base: (8, 17) out: what to add to a code of this length to get its symbol's place.
    """
    code, place = 0, 0
    for length in range(1, 17):
        base[slot, length] = place - code
        for _ in range(counts[slot, length]):
            if length <= LOOK:
                entry = _entry(symbols[slot, place], length, slot)
                first = code << (LOOK - length)
                for w in range(first, min(first + (1 << (LOOK - length)), SIZE)):
                    single[slot, w] = entry
                    lengths[slot, w] = length
            code += 1
            place += 1
        if counts[slot, length] and code >= 1 << length:
            return False
        limits[slot, length] = code << (16 - length)
        code <<= 1
    return place > 0


@njit
def _entry(symbol: Any, length: Any, slot: Any) -> Any:
    """What `single` holds for a code of `length` bits; 0 for a symbol that baseline lacks."""
    run, size = int(symbol) >> 4, int(symbol) & 15
    if slot < 4:
        return length | size << 5 if symbol <= 11 else 0
    if size:
        return (length + size) | (run + 1) << 5
    if run == 15:
        return length | 16 << 5
    return length | 1 << 5 | _EOB if run == 0 else 0


@njit
def chain(single: Any, lengths: Any, slot: Any, out: Any) -> None:
    """Join symbols whose codes lie in the same bits: one look-up then skips several of them."""
    for w in range(SIZE):
        entry = int(single[slot, w])
        bits, steps, ended = entry & 31, entry >> 5 & 255, entry & _EOB
        while entry and not ended and bits < LOOK:
            rest = (w << bits) & (SIZE - 1)
            entry = int(single[slot, rest])
            if not entry or lengths[slot, rest] > LOOK - bits or steps + (entry >> 5 & 255) > 64:
                break
            bits += entry & 31
            steps += entry >> 5 & 255
            ended = entry & _EOB
        out[slot, w] = bits | steps << 5 | ended


@njit
def find_long(word: Any, counts: Any, symbols: Any, limits: Any, base: Any, slot: Any) -> Any:
    """The entry, as in `single`, of a code of any length at the top of `word`; 0: none."""
    window = np.int64(word >> np.uint64(48))
    for length in range(1, 17):
        if counts[slot, length] and window < limits[slot, length]:
            place = base[slot, length] + (window >> (16 - length))
            if 0 <= place < 256:
                return _entry(symbols[slot, place], length, slot)
            return 0
    return 0
