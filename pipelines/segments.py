"""The side file of a beton that says where each JPEG can be cut: NAME.beton.segments.

A sample with restart markers is a row of independent entropy-coded segments, so the rows and
columns that a crop needs can be copied out of it and decoded alone. The file is a header, the
segments' lengths as a stream, and one record a sample at its end; all little-endian.
"""

from __future__ import annotations

import mmap
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # Readers of a beton need no compiler.
    from pipelines.restart import Cuts

RECORD = np.dtype(
    [
        ("first", "<u8"),
        ("head", "<u4"),
        ("frame", "<u4"),
        ("interval", "<u2"),
        ("columns", "<u2"),
        ("rows", "<u2"),
        ("mcu_width", "u1"),
        ("mcu_height", "u1"),
    ]
)
"""One sample. `first`: index of its first entry in the lengths. `head`: bytes from the start marker
to the first entropy-coded byte. `frame`: offset of the frame header's two-byte height; the width
follows. `interval`: MCUs in a segment, a divisor of `columns`; 0: it cannot be cut. `columns`,
`rows`: MCUs. `mcu_width`, `mcu_height`: pixels."""

HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("reserved", "<u4"),
        ("fingerprint", "S16"),
        ("samples", "<u8"),
        ("lengths", "<u8"),
    ]
)
MAGIC = b"rotpredS"
VERSION = 1
_BUFFER = 1 << 20


class SegmentsError(ValueError):
    """A side file that must not be used; one line naming file, place, expected and found."""


def segments_path(beton: str | os.PathLike[str]) -> Path:
    """Where the side file of a beton lies: NAME.segments."""
    return Path(f"{os.fspath(beton)}.segments")


def counts(records: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """(N,): entropy-coded segments of each sample; 0 where it cannot be cut."""
    interval = records["interval"].astype(np.int64)
    grid = records["rows"].astype(np.int64) * records["columns"]
    return np.where(interval > 0, grid // np.maximum(interval, 1), 0)


@dataclass(frozen=True, eq=False)
class Segments:
    """An open side file, mapped read-only."""

    records: npt.NDArray[np.void]
    """(N,) of `RECORD`."""
    lengths: npt.NDArray[np.uint16]
    """Bytes of each segment, without the two-byte marker behind it, sample by sample."""

    def of(self, i: int) -> npt.NDArray[np.uint16]:
        """Lengths of the segments of sample `i`, in scan order."""
        first = int(self.records["first"][i])
        return self.lengths[first : first + int(counts(self.records[i : i + 1])[0])]


def find_fault(data: bytes, head: int, lengths: npt.NDArray[np.uint16]) -> str | None:
    """Whether segments lie in a JPEG stream as they should: each with its marker behind it.

    Args:
        data: The stream.
        head: Offset of its first entropy-coded byte.
        lengths: (segments,): bytes of each.

    Returns:
        What is wrong, or None.
    """
    stream, last = np.frombuffer(data, np.uint8), len(lengths) - 1
    ends = head + np.cumsum(lengths, dtype=np.int64) + 2 * np.arange(len(lengths))
    if ends[last] + 2 != len(data):
        return f"expected segments up to byte {len(data)}, found {ends[last] + 2}"
    codes = 0xD0 + np.arange(len(lengths)) % 8
    codes[last] = 0xD9
    wrong = np.flatnonzero((stream[ends] != 0xFF) | (stream[ends + 1] != codes))
    if len(wrong):
        at = int(ends[wrong[0]])
        return f"expected marker FF{codes[wrong[0]]:02X} at byte {at}, found {data[at : at + 2]!r}"
    # In a segment FF comes before 00 only.
    marks = np.flatnonzero((stream[head:-1] == 0xFF) & (stream[head + 1 :] != 0)) + head
    if not np.array_equal(marks, ends):
        return f"expected {len(ends)} markers, found {len(marks)}"
    return None


class SegmentsWriter:
    """Streams one sample after another into a new file; `finish` makes it complete."""

    def __init__(self, path: Path, *, capacity: int) -> None:
        """Args are a file that must not exist yet, and the most samples that will come."""
        self.path = path
        self._records = np.zeros(capacity, RECORD)
        self._count = 0
        self._lengths = 0
        self._sum = 0  # CRC-32 of the lengths written.
        self._file: BinaryIO = open(path, "xb", buffering=_BUFFER)
        self._file.seek(HEADER.itemsize)

    def add(self, cuts: Cuts | None) -> None:
        """Append one sample; None: it cannot be cut."""
        record: tuple[int, ...] = (0,) * (len(RECORD.names or ()) - 1)
        if cuts is not None:
            record = cuts.record
            lengths = cuts.lengths.astype("<u2", copy=False).tobytes()
            self._file.write(lengths)
            self._sum = zlib.crc32(lengths, self._sum)
        self._records[self._count] = (self._lengths, *record)
        self._lengths += 0 if cuts is None else len(cuts.lengths)
        self._count += 1

    def finish(self, fingerprint: str) -> None:
        """Write records and header, down to the disk.

        Args:
            fingerprint: `Beton.fingerprint` of the file that this belongs to.
        """
        self._file.write(bytes(-self._file.tell() % 8))
        self._file.write(self._records[: self._count].tobytes())
        header = np.zeros(1, HEADER)
        header[0] = (MAGIC, VERSION, 0, fingerprint.encode(), self._count, self._lengths)
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        # So that whoever checks it reads the disk, not the memory that was just written from.
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def check(self, found: Segments) -> None:
        """Compare what was read back with what was written; `SegmentsError` where it differs."""
        same = np.array_equal(found.records, self._records[: self._count])
        if not same or zlib.crc32(found.lengths.data) != self._sum:
            raise SegmentsError(f"{self.path}: what was read back differs from what was written")

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()


def open_segments(path: Path, *, samples: int, fingerprint: str) -> Segments:
    """Map a side file and check its structure.

    Args:
        path: The file.
        samples: How many the beton has.
        fingerprint: The beton's.

    Raises:
        SegmentsError: It is damaged, or belongs to another beton.
        OSError: It cannot be read.
    """

    def fail(place: str, expected: object, found: object) -> SegmentsError:
        return SegmentsError(f"{path}: {place}: expected {expected}, found {found}")

    size = path.stat().st_size
    if size < HEADER.itemsize:
        raise fail("byte 0", f"a header of {HEADER.itemsize} bytes", f"a file of {size}")
    with open(path, "rb", buffering=0) as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
    header = data[: HEADER.itemsize].view(HEADER)[0]
    if header["magic"] != MAGIC or header["version"] != VERSION:
        found = f"{bytes(header['magic'])!r}, version {header['version']}"
        raise fail("byte 0", f"{MAGIC!r}, version {VERSION}", found)
    if header["fingerprint"] != fingerprint.encode():
        found = bytes(header["fingerprint"]).decode("ascii", "backslashreplace")
        raise fail("byte 16", f"a file of beton {fingerprint}", found)
    if header["samples"] != samples:
        raise fail("byte 32", f"{samples} samples as in the beton", header["samples"])
    total = int(header["lengths"])
    place = HEADER.itemsize + 2 * total
    place += -place % 8
    if place + samples * RECORD.itemsize != len(data):
        raise fail("byte 40", f"lengths and {samples} records in {len(data)} bytes", total)
    records = data[place:].view(RECORD)

    def check(fine: npt.NDArray[np.bool_], expected: str, key: str) -> None:
        if not fine.all():
            i = int(np.argmin(fine))
            raise fail(f"sample {i}", expected, records[key][i])

    cut = records["interval"] > 0
    grid = (records["columns"] > 0) & (records["rows"] > 0)
    check(~cut | grid, "a grid of MCUs", "columns")
    divides = records["columns"] % np.maximum(records["interval"], 1) == 0
    check(~cut | divides, "an interval that divides its columns", "interval")
    for key in ("mcu_width", "mcu_height"):
        fine = np.isin(records[key], (8, 16, 32))
        check(~cut | fine, f"{key} 8, 16 or 32", key)
    room = records["head"].astype(np.int64) - records["frame"]
    inside = (records["frame"] > 0) & (room >= 4)
    check(~cut | inside, "a frame header before the scan", "frame")
    ends = np.cumsum(counts(records), dtype=np.uint64)
    check(records["first"][1:] == ends[:-1], "lengths that follow one another", "first")
    if records["first"][0] != 0 or ends[-1] != total:
        raise fail("byte 40", f"{ends[-1]} lengths from 0", f"{total} from {records['first'][0]}")
    lengths = data[HEADER.itemsize : HEADER.itemsize + 2 * total].view("<u2")
    return Segments(records=records, lengths=lengths)
