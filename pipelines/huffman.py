"""Compiled walk over the Huffman-coded scan of a baseline JPEG: every code, no coefficient.

It sees all that a decoder of coefficients sees, in a fraction of the time, and notes where each
block's DC code lies so that `pipelines.restart` can begin a segment there. ITU-T T.81, annexes B
and F.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit

FINE: Final = 0
BAD_TABLE: Final = 1
NO_CODE: Final = 2
LONG_BLOCK: Final = 3
TOO_SHORT: Final = 4
BAD_RESTART: Final = 5
BAD_DC: Final = 6

REASONS: Final = {
    BAD_TABLE: "a Huffman table that is malformed or missing",
    NO_CODE: "a Huffman code that is in no table",
    LONG_BLOCK: "a block of more than 64 coefficients",
    TOO_SHORT: "coded data that end too early",
    BAD_RESTART: "a restart marker that is missing or out of place",
    BAD_DC: "a DC coefficient out of range",
}

BLOCK: Final = np.dtype([("at", np.int64), ("value", np.int32), ("bits", np.int32)])
"""A block's DC difference: bit at which its code begins in the unstuffed data, the difference, and
the bits of code and value."""

_LOOK: Final = 11  # Bits looked up at once: the tables of a picture stay in the first-level cache.
_SIZE: Final = 1 << _LOOK
_MAX_DC: Final = 2047
PAD: Final = 272
"""Readable bytes that the unstuffed data need behind them: for a block's longest codes."""
_EOB: Final = 1 << 13

_WINDOW: Final = np.uint64(64 - _LOOK)
_ONES: Final = np.uint64(0x0101010101010101)
_TOPS: Final = np.uint64(0x8080808080808080)


@njit(cache=True, nogil=True, error_model="numpy")
def load(clean: Any, bit: Any) -> Any:
    """At least 57 bits from a place on, at the top of a word."""
    i = bit >> np.uint64(3)
    word = np.uint64(clean[i]) << np.uint64(56)
    word |= np.uint64(clean[i + np.uint64(1)]) << np.uint64(48)
    word |= np.uint64(clean[i + np.uint64(2)]) << np.uint64(40)
    word |= np.uint64(clean[i + np.uint64(3)]) << np.uint64(32)
    word |= np.uint64(clean[i + np.uint64(4)]) << np.uint64(24)
    word |= np.uint64(clean[i + np.uint64(5)]) << np.uint64(16)
    word |= np.uint64(clean[i + np.uint64(6)]) << np.uint64(8)
    word |= np.uint64(clean[i + np.uint64(7)])
    return word << (bit & np.uint64(7))


@njit(cache=True, nogil=True, error_model="numpy")
def _unstuff(data: Any, start: int, clean: Any, starts: Any) -> Any:
    """Copy entropy-coded data without stuffed zeros and restart markers.

    Args:
        data: (bytes,) of the stream.
        start: Where the scan's data begin.
        clean: Takes the copy.
        starts: Takes the offset in `clean` behind each restart marker, from its second entry on.

    Returns:
        Bytes copied, restart markers found (-1: wrong number or too many), and the offset of the
        marker that ends the scan (the length of `data`: there is none).
    """
    stop = len(data) - 1
    i, j, found = np.uint64(start), np.uint64(0), 0
    last = np.uint64(max(stop, 0))
    one, two = np.uint64(1), np.uint64(2)
    far = np.uint64(max(stop - 8, 0))
    while i < last:
        while i < far:  # Eight bytes at a time while none is FF.
            word = load(data, i << np.uint64(3))
            if (~word - _ONES) & word & _TOPS:
                break
            for k in range(8):
                clean[j + np.uint64(k)] = word >> np.uint64(56 - 8 * k) & np.uint64(0xFF)
            i += np.uint64(8)
            j += np.uint64(8)
        byte = data[i]
        if byte != 0xFF:
            clean[j] = byte
            i += one
            j += one
            continue
        code = data[i + one]
        if code == 0:
            clean[j] = byte
            i += two
            j += one
        elif code == 0xFF:
            i += one
        elif code >= 0xD0 and code <= 0xD7:
            found += 1
            if found >= len(starts) or code != 0xD0 + (found - 1) % 8:
                return np.int64(j), -1, np.int64(i)
            starts[found] = np.int64(j)
            i += two
        else:
            return np.int64(j), found, np.int64(i)
    return np.int64(j), found, len(data)


@njit(cache=True, nogil=True, error_model="numpy")
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


@njit(cache=True, nogil=True, error_model="numpy")
def _build(
    counts: Any, symbols: Any, dc: bool, single: Any, lengths: Any, limits: Any, base: Any
) -> bool:
    """Make the look-up of one table; False where its codes are impossible.

    Args:
        counts: (17,) codes of each length.
        symbols: (256,).
        dc: Whether its symbols are sizes of DC differences.
        single: (2 ** _LOOK,) out, by the next bits: bits of code and value (5 bits), what the
            symbol adds to the coefficient's index (8), end of block (1). DC: bits of the code (5),
            size. 0 where the code is longer than `_LOOK`, or is none.
        lengths: (2 ** _LOOK,) out: bits of the code alone.
        limits: (17,) out: first 16 bits that are no code of at most this length.
        base: (17,) out: what to add to a code of this length to get its symbol's place.
    """
    single[:] = 0
    lengths[:] = 0
    code, place = 0, 0
    for length in range(1, 17):
        base[length] = place - code
        for _ in range(counts[length]):
            if length <= _LOOK:
                entry = _entry(symbols[place], length, dc)
                first = code << (_LOOK - length)
                for w in range(first, min(first + (1 << (_LOOK - length)), _SIZE)):
                    single[w] = entry
                    lengths[w] = length
            code += 1
            place += 1
        if counts[length] and code >= 1 << length:
            return False
        limits[length] = code << (16 - length)
        code <<= 1
    return place > 0


@njit(cache=True, nogil=True, error_model="numpy")
def _entry(symbol: int, length: int, dc: bool) -> int:
    """What `single` holds for a code of `length` bits; 0 for a symbol that baseline lacks."""
    run, size = int(symbol) >> 4, int(symbol) & 15
    if dc:
        return length | size << 5 if symbol <= 11 else 0
    if size:
        return (length + size) | (run + 1) << 5
    if run == 15:
        return length | 16 << 5
    return length | 1 << 5 | _EOB if run == 0 else 0


@njit(cache=True, nogil=True, error_model="numpy")
def _chain(single: Any, lengths: Any, out: Any) -> None:
    """Join symbols whose codes lie in the same bits: one look-up then skips several of them."""
    for w in range(_SIZE):
        entry = int(single[w])
        bits, steps, ended = entry & 31, entry >> 5 & 255, entry & _EOB
        while entry and not ended and bits < _LOOK:
            rest = (w << bits) & (_SIZE - 1)
            entry = int(single[rest])
            if not entry or lengths[rest] > _LOOK - bits or steps + (entry >> 5 & 255) > 64:
                break
            bits += entry & 31
            steps += entry >> 5 & 255
            ended = entry & _EOB
        out[w] = bits | steps << 5 | ended


@njit(cache=True, nogil=True, error_model="numpy")
def _long(word: Any, counts: Any, symbols: Any, limits: Any, base: Any, dc: bool) -> int:
    """The entry, as in `single`, of a code of any length at the top of `word`; 0: none."""
    window = np.int64(word >> np.uint64(48))
    for length in range(1, 17):
        if counts[length] and window < limits[length]:
            place = base[length] + (window >> (16 - length))
            if 0 <= place < 256:
                return _entry(symbols[place], length, dc)
            return 0
    return 0


@njit(cache=True, nogil=True, error_model="numpy")
def walk(
    data: Any, start: int, bounds: Any, units: Any, slots: Any, mcus: int, restart: int,
    clean: Any, starts: Any, ends: Any, blocks: Any,
) -> Any:  # fmt: skip
    """Walk one interleaved scan of a sequential frame of 8 bits.

    Args:
        data: uint8 (bytes,): the stream.
        start: Offset of the first entropy-coded byte.
        bounds: int64 (n, 2): bodies of the DHT segments before the scan.
        units: int64 (U,): component of each block of an MCU.
        slots: int64 (3, 2): rows of each component's DC and AC table, 4 * class + number.
        mcus: How many there must be.
        restart: MCUs between restart markers; 0 without.
        clean: uint8 (bytes of the scan and `PAD` more) out: the data without stuffing.
        starts: int64 (segments + 1,) out: where in `clean` each restart segment begins.
        ends: int64 (segments,) out: bit behind the last block of each.
        blocks: `BLOCK` (mcus * U,) out.

    Returns:
        `FINE` or a key of `REASONS`, the MCU where that was found, the offset of the marker that
        ends the scan, and the whole bytes that no block uses.
    """
    counts = np.zeros((8, 17), np.int64)
    symbols = np.zeros((8, 256), np.uint8)
    if not read_tables(data, bounds, counts, symbols):
        return BAD_TABLE, 0, start, 0
    single = np.empty((8, _SIZE), np.uint16)
    lengths = np.empty(_SIZE, np.uint8)
    chains = np.empty((8, _SIZE), np.uint16)
    limits = np.zeros((8, 17), np.int64)
    base = np.zeros((8, 17), np.int64)
    for slot in range(8):
        if not (slots == slot).any():
            continue
        if not _build(
            counts[slot], symbols[slot], slot < 4, single[slot], lengths, limits[slot], base[slot]
        ):
            return BAD_TABLE, 0, start, 0
        if slot >= 4:
            _chain(single[slot], lengths, chains[slot])
    singles, joined = single.reshape(-1), chains.reshape(-1)

    starts[0] = 0
    size, found, end = _unstuff(data, start, clean, starts)
    segments = len(ends)
    if found != segments - 1:
        return BAD_RESTART, max(found, 0) * restart, end, 0
    starts[segments] = size
    clean[size : size + PAD] = 0

    predicted = np.zeros(3, np.int64)
    n = 0
    spare: Any = 0
    per = restart if restart else mcus
    for segment in range(segments):
        bit = np.uint64(starts[segment] * 8)
        stop = np.uint64(starts[segment + 1] * 8)
        predicted[:] = 0
        for mcu in range(segment * per, min(segment * per + per, mcus)):
            for u in range(len(units)):
                component = units[u]
                dc, ac = slots[component, 0], slots[component, 1]
                word = load(clean, bit)
                entry: Any = np.int64(singles[np.uint64(dc << _LOOK) + (word >> _WINDOW)])
                if entry == 0:
                    entry = _long(word, counts[dc], symbols[dc], limits[dc], base[dc], True)
                    if entry == 0:
                        return NO_CODE, mcu, end, 0
                length, width = entry & 31, entry >> 5
                value: Any = 0
                if width:
                    rest = word << np.uint64(length)
                    value = np.int64(rest >> np.uint64(64 - width))
                    if value < 1 << (width - 1):
                        value -= (1 << width) - 1
                predicted[component] += value
                if predicted[component] > _MAX_DC or predicted[component] < -_MAX_DC:
                    return BAD_DC, mcu, end, 0
                bits: Any = length + width
                blocks[n].at = np.int64(bit)
                blocks[n].value = value
                blocks[n].bits = bits
                n += 1
                bit += np.uint64(bits)
                k, row = 1, np.uint64(ac << _LOOK)
                while k < 64:
                    word = load(clean, bit)
                    for _ in range(2):  # The second code begins at most 31 of the 57 bits later.
                        place = row + (word >> _WINDOW)
                        entry = np.int64(joined[place])
                        if entry == 0 or k + (entry >> 5 & 255) > 64:
                            entry = np.int64(singles[place])
                            if entry == 0:
                                entry = _long(
                                    word, counts[ac], symbols[ac], limits[ac], base[ac], False
                                )
                            if entry == 0:
                                return NO_CODE, mcu, end, 0
                            if k + (entry >> 5 & 255) > 64:
                                return LONG_BLOCK, mcu, end, 0
                        bits = entry & 31
                        bit += np.uint64(bits)
                        word <<= np.uint64(bits)
                        k += (entry >> 5 & 255) + (entry >> 7 & 64)
                        if k >= 64:
                            break
                if bit > stop:
                    return TOO_SHORT, mcu, end, 0
        ends[segment] = np.int64(bit)
        spare += np.int64((stop - bit) >> np.uint64(3))
    return FINE, 0, end, spare
