"""Restart markers put into finished JPEG streams, which can then be cut: same coefficients.

Every segment between two markers begins on a byte and predicts its DC coefficients from zero, so it
can be decoded without the ones before it. Only the first DC code of each component in a segment
changes; all other bits are copied. ITU-T T.81, annexes B, F and K.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.jpeg.huffman_tables import read_tables
from pipelines.jpeg.scan import Scan, table_bounds
from pipelines.native.jit import njit
from pipelines.native.llvm import load_bits

SHARE: Final = 0.018
"""Bytes added, as a share of a stream's, that the finest cut may cost."""

_PER_SEGMENT = 5.0  # Bytes: the marker, half a byte of padding, and longer DC codes.
_MOST = 0xFFFF  # Bytes in a segment, and MCUs in an interval.
_NO_CODE, _TOO_LONG = -1, -2
_FF = np.uint64(0xFF)
_U8, _U32 = np.uint64(8), np.uint64(32)
_LOW, _ONES, _TOPS = np.uint64(0xFFFFFFFF), np.uint64(0x01010101), np.uint64(0x80808080)

# Annex K.3: codes of each length, luminance and chrominance; the symbols are 0 to 11.
_STANDARD = (
    bytes((0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0)),
    bytes((0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0)),
)


class RestartLayout(NamedTuple):
    """Where a stream with restart markers can be cut; fields as in `segments.RECORD`."""

    head: int
    frame: int
    interval: int
    columns: int
    rows: int
    mcu_width: int
    mcu_height: int
    lengths: npt.NDArray[np.uint16]
    """(segments,): bytes of each, without the marker behind it."""

    @property
    def record(self) -> tuple[int, ...]:
        """All fields of `segments.RECORD` but `first`."""
        return self[:7]


def with_restarts(data: bytes, scan: Scan) -> tuple[bytes, RestartLayout] | None:
    """Write the stream anew with a restart marker behind every segment but the last.

    A segment is a part of a row of MCUs: the finest of its divisors that adds at most `SHARE` to
    the stream, or a whole row. Restart markers that were there are replaced. Where a DC table lacks
    a code that is needed, the standard ones take its place.

    Args:
        data: The stream.
        scan: What `walk_scan` found in it.

    Returns:
        The new stream, and where it can be cut; None where a difference of DC coefficients has no
        code even in the standard tables.
    """
    standard = False
    codes = _codes(data, scan, standard)
    for interval in _intervals(scan):
        lengths = np.empty(scan.rows * scan.columns // interval, np.uint16)
        # What is copied, a DC code of up to 31 bits with its value for each block, and padding and
        # a marker behind each segment: all of it twice as long if each byte is FF and gets its 00.
        out = np.empty(2 * len(scan.clean) + 8 * len(scan.blocks) + 8 * len(lengths), np.uint8)
        while True:
            size = int(_emit(scan.clean, scan.ends, scan.blocks, scan.units, codes,
                             scan.header.restart, interval, standard, out, lengths))  # fmt: skip
            if size != _NO_CODE:
                break
            if standard:
                return None
            standard = True
            codes = _codes(data, scan, standard)
        if size != _TOO_LONG:
            head, frame = _head(data, scan, interval, standard)
            cuts = RestartLayout(len(head), frame, interval, scan.columns, scan.rows, scan.mcu_width,
                        scan.mcu_height, lengths)  # fmt: skip
            return b"".join((head, out[:size].tobytes(), b"\xff\xd9")), cuts
    return None


def _intervals(scan: Scan) -> list[int]:
    """MCUs in a segment, the best choice first; the others are for segments that get too long."""
    columns = scan.columns
    whole = [n for n in range(1, min(columns, _MOST) + 1) if columns % n == 0]
    fine = [n for n in whole if scan.rows * columns // n * _PER_SEGMENT <= SHARE * scan.end]
    best = fine[0] if fine else whole[-1]
    return [n for n in reversed(whole) if n <= best]


def _codes(data: bytes, scan: Scan, standard: bool) -> npt.NDArray[np.int64]:
    """(3, 16, 2): code and its bits by component and size of a DC difference; 0 bits: none."""
    counts, symbols = np.zeros((8, 17), np.int64), np.zeros((8, 256), np.uint8)
    read_tables(np.frombuffer(data, np.uint8), table_bounds(scan.header), counts, symbols)
    if standard:
        for slot, table in _standard(scan).items():
            counts[slot, 1:] = list(table)
            symbols[slot, :12] = range(12)
    codes = np.zeros((3, 16, 2), np.int64)
    _assign(counts, symbols, scan.slots, codes)
    return codes


@njit
def _assign(counts: Any, symbols: Any, slots: Any, codes: Any) -> None:
    """Number the codes of each component's DC table, as T.81 does in annex C."""
    for component in range(len(slots)):
        slot, code, place = slots[component, 0], 0, 0
        for length in range(1, 17):
            for _ in range(counts[slot, length]):
                codes[component, symbols[slot, place] & 15, 0] = code
                codes[component, symbols[slot, place] & 15, 1] = length
                code += 1
                place += 1
            code <<= 1


def _standard(scan: Scan) -> dict[int, bytes]:
    """The standard table for each DC table: luminance for that of the first component."""
    slots = scan.slots[:, 0].tolist()
    return {slot: _STANDARD[int(slot != slots[0])] for slot in slots}


def _head(data: bytes, scan: Scan, interval: int, standard: bool) -> tuple[bytes, int]:
    """The stream up to its coded data, with this interval; and where its frame says the height."""
    header = scan.header
    kept, pos, frame = [data[:2]], 2, 0
    while pos < header.scan:
        while data[pos + 1] == 0xFF:  # Fill bytes.
            pos += 1
        stop = pos + 2 + int.from_bytes(data[pos + 2 : pos + 4], "big")
        if data[pos + 1] != 0xDD:
            if pos == header.frame_at:
                frame = sum(map(len, kept)) + 5
            kept.append(data[pos:stop])
        pos = stop
    if standard:
        for slot, table in _standard(scan).items():
            kept.append(b"\xff\xc4\x00\x1f" + bytes((slot,)) + table + bytes(range(12)))
    kept.append(b"\xff\xdd\x00\x04" + interval.to_bytes(2, "big"))
    kept.append(data[header.scan : header.coded])
    return b"".join(kept), frame


@njit
def _put(out: Any, pos: Any, held: Any, bits: Any, value: Any, more: Any) -> Any:
    """Append up to 32 bits; whole bytes go out, stuffed. Returns the new pos, held and bits."""
    held = held << more | value
    bits += more
    while bits >= _U8:
        bits -= _U8
        byte = held >> bits & _FF
        out[pos] = byte
        pos += np.uint64(1)
        if byte == _FF:
            out[pos] = 0
            pos += np.uint64(1)
    return pos, held, bits


@njit
def _copy(out: Any, pos: Any, held: Any, bits: Any, clean: Any, start: Any, stop: Any) -> Any:
    """Append bits `start` to `stop` of the unstuffed data at the address `clean`."""
    at, end = np.uint64(start), np.uint64(stop)
    while at + _U32 <= end:
        value = load_bits(clean, at) >> _U32
        at += _U32
        joined = held << _U32 | value
        word = joined >> bits & _LOW
        if (_LOW - word - _ONES) & word & _TOPS:  # Perhaps an FF; surely one where it is the first.
            pos, held, bits = _put(out, pos, held, bits, value, _U32)
            continue
        out[pos] = word >> np.uint64(24)
        out[pos + np.uint64(1)] = word >> np.uint64(16) & _FF
        out[pos + np.uint64(2)] = word >> _U8 & _FF
        out[pos + np.uint64(3)] = word & _FF
        pos += np.uint64(4)
        held = joined
    if at < end:
        left = end - at
        value = load_bits(clean, at) >> (np.uint64(64) - left)
        pos, held, bits = _put(out, pos, held, bits, value, left)
    return pos, held, bits


@njit
def _emit(
    clean: Any, ends: Any, blocks: Any, units: Any, codes: Any, restart: int, interval: int,
    anew: bool, out: Any, lengths: Any,
) -> Any:  # fmt: skip
    """Write the coded data with a segment every `interval` MCUs.

    Args:
        clean, ends, blocks, units: As in `Scan`.
        codes: As from `_codes`.
        restart: MCUs between the markers that were there; 0 without.
        interval: MCUs in a segment.
        anew: Write all DC codes, not only those that change.
        out: uint8 out: the data without the end marker.
        lengths: uint16 (segments,) out: bytes of each.

    Returns:
        Bytes written, `_NO_CODE` or `_TOO_LONG`.
    """
    per = len(units)
    mcus = len(blocks) // per
    source = np.uint64(clean.ctypes.data)
    pos, held, bits, begin = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    segment, cursor = 0, np.int64(0)
    true, guess = np.zeros(3, np.int64), np.zeros(3, np.int64)
    for mcu in range(mcus + 1):
        new = mcu == mcus or mcu % interval == 0
        old = mcu == mcus or (restart > 0 and mcu % restart == 0)
        n = mcu * per
        if mcu > 0 and (new or old):
            stop = ends[(mcu - 1) // restart if restart else 0] if old else blocks[n].at
            pos, held, bits = _copy(out, pos, held, bits, source, cursor, stop)
            if new:
                if bits:
                    fill = _U8 - bits
                    ones = (np.uint64(1) << fill) - np.uint64(1)
                    pos, held, bits = _put(out, pos, held, bits, ones, fill)
                if pos - begin > np.uint64(_MOST):
                    return _TOO_LONG
                lengths[segment] = pos - begin
                if mcu == mcus:
                    break
                out[pos] = 0xFF
                out[pos + np.uint64(1)] = 0xD0 + segment % 8
                pos += np.uint64(2)
                begin = pos
                segment += 1
            cursor = blocks[n].at
        if new:
            guess[:] = 0
        if old:
            true[:] = 0
        for u in range(per):
            component, value = units[u], np.int64(blocks[n + u].value)
            true[component] += value
            fresh = true[component] - guess[component]
            guess[component] = true[component]
            if fresh == value and not anew:
                continue
            size = 0
            while abs(fresh) >> size:
                size += 1
            if size > 15 or codes[component, size, 1] == 0:
                return _NO_CODE
            pos, held, bits = _copy(out, pos, held, bits, source, cursor, blocks[n + u].at)
            low = fresh if fresh >= 0 else fresh + (1 << size) - 1
            pos, held, bits = _put(
                out, pos, held, bits,
                np.uint64(codes[component, size, 0] << size | low),
                np.uint64(codes[component, size, 1] + size),
            )  # fmt: skip
            cursor = blocks[n + u].at + blocks[n + u].bits
    return np.int64(pos)
