"""Lossless insertion of restart markers into JPEG streams, so that crops can be cut out.

Every segment between two markers starts on a byte and predicts its DC coefficients from zero, so it
can be decoded without the ones before it. Only the first DC code of each component in a segment
changes; all other bits are copied. ITU-T T.81, annexes B, F and K.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from pipelines.arrays import Int64, Uint16
from pipelines.jpeg.huffman_tables import read_huffman_tables
from pipelines.jpeg.scan import Scan, table_bounds
from pipelines.native.jit import njit
from pipelines.native.llvm import load_bits

MAX_OVERHEAD: Final = 0.018
"""Largest growth of a stream that is accepted for finer segments, as a share of its bytes."""

_BYTES_PER_SEGMENT = 5.0  # The marker, half a byte of padding, and longer DC codes.
_MAX_UINT16 = 0xFFFF  # Limit on the bytes in a segment and on the MCUs in an interval.
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
    """Where a stream with restart markers can be cut.

    The fields are those of `pipelines.beton.segments.RECORD`.
    """

    head: int
    frame: int
    interval: int
    columns: int
    rows: int
    mcu_width: int
    mcu_height: int
    lengths: Uint16
    """(segments,), bytes of each segment without the marker after it."""

    @property
    def record(self) -> tuple[int, ...]:
        """All fields of `segments.RECORD` except `first`."""
        return self[:7]


def insert_restart_markers(data: bytes, scan: Scan) -> tuple[bytes, RestartLayout] | None:
    """Rewrite a stream with a restart marker after every segment but the last.

    A segment is a whole row of MCUs or an even part of one: the smallest that adds at most
    `MAX_OVERHEAD` to the stream. Existing restart markers are replaced. If a DC table lacks a code
    that is needed, the standard tables replace all DC tables.

    Args:
        data: The stream.
        scan: The result of `walk_scan` for it.

    Returns:
        The new stream and where it can be cut; None if a DC difference has no code even in the
        standard tables.
    """
    standard = False
    codes = _codes(data, scan, standard)
    for interval in _intervals(scan):
        lengths = np.empty(scan.rows * scan.columns // interval, np.uint16)
        # The copied bits, a DC code of up to 31 bits with its value per block, and padding and a
        # marker per segment. All of it doubles if every byte is FF and is stuffed with 00.
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
            layout = RestartLayout(
                len(head), frame, interval, scan.columns, scan.rows, scan.mcu_width,
                scan.mcu_height, lengths,
            )  # fmt: skip
            return b"".join((head, out[:size].tobytes(), b"\xff\xd9")), layout
    return None


def _intervals(scan: Scan) -> list[int]:
    """MCUs per segment, best choice first. The others are tried if segments get too long."""
    columns = scan.columns
    divisors = [n for n in range(1, min(columns, _MAX_UINT16) + 1) if columns % n == 0]
    budget = MAX_OVERHEAD * scan.end
    fine = [n for n in divisors if scan.rows * columns // n * _BYTES_PER_SEGMENT <= budget]
    best = fine[0] if fine else divisors[-1]
    return [n for n in reversed(divisors) if n <= best]


def _codes(data: bytes, scan: Scan, standard: bool) -> Int64:
    """(3, 16, 2), code and its length by component and size of a DC difference; length 0: none."""
    counts, symbols = np.zeros((8, 17), np.int64), np.zeros((8, 256), np.uint8)
    read_huffman_tables(np.frombuffer(data, np.uint8), table_bounds(scan.header), counts, symbols)
    if standard:
        for slot, table in _standard(scan).items():
            counts[slot, 1:] = list(table)
            symbols[slot, :12] = range(12)
    codes = np.zeros((3, 16, 2), np.int64)
    _assign(counts, symbols, scan.slots, codes)
    return codes


@njit
def _assign(counts: Any, symbols: Any, slots: Any, codes: Any) -> None:
    """Assign the codes of each component's DC table as in T.81, annex C."""
    for component in range(len(slots)):
        slot, code, index = slots[component, 0], 0, 0
        for length in range(1, 17):
            for _ in range(counts[slot, length]):
                codes[component, symbols[slot, index] & 15, 0] = code
                codes[component, symbols[slot, index] & 15, 1] = length
                code += 1
                index += 1
            code <<= 1


def _standard(scan: Scan) -> dict[int, bytes]:
    """The standard table for each DC slot: luminance for the first component's, or chrominance."""
    slots = scan.slots[:, 0].tolist()
    return {slot: _STANDARD[int(slot != slots[0])] for slot in slots}


def _head(data: bytes, scan: Scan, interval: int, standard: bool) -> tuple[bytes, int]:
    """Rewrite the header with a new restart interval; return it and the offset of its height."""
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
    """Append up to 32 bits. Writes whole bytes, stuffed; returns the new pos, held and bits."""
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
        if (_LOW - word - _ONES) & word & _TOPS:  # A byte is FF.
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
    rewrite_all: bool, out: Any, lengths: Any,
) -> Any:  # fmt: skip
    """Write the coded data with a segment every `interval` MCUs.

    Args:
        clean, ends, blocks, units: As in `Scan`.
        codes: As from `_codes`.
        restart: MCUs between the markers of the input; 0 if there are none.
        interval: MCUs per segment.
        rewrite_all: Write all DC codes, not only those that change.
        out: uint8 (bytes,), output: the data without the end marker.
        lengths: uint16 (segments,), output: bytes of each segment.

    Returns:
        The number of bytes written, `_NO_CODE` or `_TOO_LONG`.
    """
    blocks_per_mcu = len(units)
    mcus = len(blocks) // blocks_per_mcu
    source = np.uint64(clean.ctypes.data)
    pos, held, bits, begin = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    segment, cursor = 0, np.int64(0)
    actual, predicted = np.zeros(3, np.int64), np.zeros(3, np.int64)
    for mcu in range(mcus + 1):
        new_segment = mcu == mcus or mcu % interval == 0
        old_segment = mcu == mcus or (restart > 0 and mcu % restart == 0)
        n = mcu * blocks_per_mcu
        if mcu > 0 and (new_segment or old_segment):
            if old_segment:
                stop = ends[(mcu - 1) // restart if restart else 0]
            else:
                stop = blocks[n].at
            pos, held, bits = _copy(out, pos, held, bits, source, cursor, stop)
            if new_segment:
                if bits:
                    fill = _U8 - bits
                    ones = (np.uint64(1) << fill) - np.uint64(1)
                    pos, held, bits = _put(out, pos, held, bits, ones, fill)
                if pos - begin > np.uint64(_MAX_UINT16):
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
        if new_segment:
            predicted[:] = 0
        if old_segment:
            actual[:] = 0
        for u in range(blocks_per_mcu):
            component, value = units[u], np.int64(blocks[n + u].value)
            actual[component] += value
            difference = actual[component] - predicted[component]
            predicted[component] = actual[component]
            if difference == value and not rewrite_all:
                continue
            size = 0
            while abs(difference) >> size:
                size += 1
            if size > 15 or codes[component, size, 1] == 0:
                return _NO_CODE
            pos, held, bits = _copy(out, pos, held, bits, source, cursor, blocks[n + u].at)
            low = difference if difference >= 0 else difference + (1 << size) - 1
            pos, held, bits = _put(
                out, pos, held, bits,
                np.uint64(codes[component, size, 0] << size | low),
                np.uint64(codes[component, size, 1] + size),
            )  # fmt: skip
            cursor = blocks[n + u].at + blocks[n + u].bits
    return np.int64(pos)
