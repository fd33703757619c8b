"""Lookup tables for the Huffman codes of a baseline JPEG. ITU-T T.81, annexes B, C and F."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from pipelines.native.jit import njit

LOOK: Final = 11
"""Bits per lookup: small enough that an image's tables stay in the L1 cache."""
SIZE: Final = 1 << LOOK
"""Entries of a lookup table."""
_EOB: Final = 1 << 13


@njit
def read_huffman_tables(data: Any, bounds: Any, counts: Any, symbols: Any) -> bool:
    """Read the Huffman tables of all DHT segments. Later tables replace earlier ones.

    Args:
        data: uint8 (bytes,), the stream.
        bounds: int64 (n, 2), start and end of each segment's body.
        counts: int64 (8, 17), output: codes of each length; the row is 4 * class + number.
        symbols: uint8 (8, 256), output: the symbol of each code.

    Returns:
        Whether the segments are well-formed.
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
def build_lookup(
    counts: Any, symbols: Any, slot: Any, single: Any, lengths: Any, limits: Any, base: Any
) -> bool:
    """Build the lookup of one table.

    Args:
        counts: int64 (8, 17), codes of each length.
        symbols: uint8 (8, 256).
        slot: Row of the table; the symbols of the first four are sizes of DC differences.
        single: uint16 (8, SIZE) of zeros, output, indexed by the next `LOOK` bits. AC: bits of code
            and value (5 bits), what the symbol adds to the coefficient's index (8), end of block
            (1). DC: bits of the code (5), size. 0 if the code is longer than `LOOK` or invalid.
        lengths: uint8 (8, SIZE) of zeros, output: bits of the code alone.
        limits: int64 (8, 17), output: the first 16-bit value above all codes up to this length.
        base: int64 (8, 17), output: offset from a code of this length to its symbol's index.

    Returns:
        Whether the codes are possible: some, and no more than fit their lengths.
    """
    code, index = 0, 0
    for length in range(1, 17):
        base[slot, length] = index - code
        for _ in range(counts[slot, length]):
            if length <= LOOK:
                entry = _entry(symbols[slot, index], length, slot)
                first = code << (LOOK - length)
                for w in range(first, min(first + (1 << (LOOK - length)), SIZE)):
                    single[slot, w] = entry
                    lengths[slot, w] = length
            code += 1
            index += 1
        if counts[slot, length] and code >= 1 << length:
            return False
        limits[slot, length] = code << (16 - length)
        code <<= 1
    return index > 0


@njit
def _entry(symbol: Any, length: Any, slot: Any) -> Any:
    """The entry of `single` for a code of `length` bits; 0 if baseline has no such symbol."""
    run, size = int(symbol) >> 4, int(symbol) & 15
    if slot < 4:
        return length | size << 5 if symbol <= 11 else 0
    if size:
        return (length + size) | (run + 1) << 5
    if run == 15:
        return length | 16 << 5
    return length | 1 << 5 | _EOB if run == 0 else 0


@njit
def chain_symbols(single: Any, lengths: Any, slot: Any, out: Any) -> None:
    """Join symbols whose codes fit into one lookup, so that it skips several of them.

    Args:
        single: uint16 (8, SIZE), as from `build_lookup`.
        lengths: uint8 (8, SIZE), as from `build_lookup`.
        slot: Row of the table.
        out: uint16 (8, SIZE), output: row `slot`, encoded as in `single`.
    """
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
def find_long_code(word: Any, counts: Any, symbols: Any, limits: Any, base: Any, slot: Any) -> Any:
    """Look up the code of any length at the top of the 64-bit `word`.

    Returns:
        The entry, encoded as in `single` of `build_lookup`; 0 if there is no such code.
    """
    window = np.int64(word >> np.uint64(48))
    for length in range(1, 17):
        if counts[slot, length] and window < limits[slot, length]:
            index = base[slot, length] + (window >> (16 - length))
            if 0 <= index < 256:
                return _entry(symbols[slot, index], length, slot)
            return 0
    return 0
