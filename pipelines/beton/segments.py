"""Side file of a beton, NAME.beton.segments: where each JPEG stream can be cut.

A sample with restart markers is a sequence of independent entropy-coded segments, so the rows and
columns that a crop needs can be copied and decoded alone. The file is a header, the lengths of all
segments, and one record per sample at the end; all little-endian.
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

from pipelines.arrays import Bool, Int64
from pipelines.beton.layout import RAW, BetonError, Checker, Layout, drop_pages, row_blocks

if TYPE_CHECKING:  # Reading a beton needs no compiler.
    from pipelines.jpeg.restart_markers import RestartLayout

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
"""Record of one sample. `first`: index of its first entry in the lengths. `head`: bytes from the
start marker to the first entropy-coded byte. `frame`: offset of the two-byte height in the frame
header; the width follows. `interval`: MCUs in a segment, a divisor of `columns`; 0 if the sample
cannot be cut. `columns`, `rows`: size in MCUs. `mcu_width`, `mcu_height`: size of an MCU in
pixels."""

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


def segments_path(beton: str | os.PathLike[str]) -> Path:
    """Return the path of a beton's side file: NAME.segments."""
    return Path(f"{os.fspath(beton)}.segments")


def counts(records: npt.NDArray[np.void]) -> Int64:
    """Return the number of entropy-coded segments of each sample, int64 (N,).

    Args:
        records: (N,) of `RECORD`.

    Returns:
        The counts; 0 for samples that cannot be cut.
    """
    interval = records["interval"].astype(np.int64)
    grid = records["rows"].astype(np.int64) * records["columns"]
    return np.where(interval > 0, grid // np.maximum(interval, 1), 0)


@dataclass(frozen=True, eq=False)
class Segments:
    """An open side file, memory-mapped read-only."""

    records: npt.NDArray[np.void]
    """(N,) of `RECORD`."""
    lengths: npt.NDArray[np.uint16]
    """(segments,): bytes of each segment, without the two-byte marker after it, sample by
    sample."""

    def of(self, i: int) -> npt.NDArray[np.uint16]:
        """Return the lengths of the segments of sample `i` in scan order, uint16 (segments,)."""
        first = int(self.records["first"][i])
        return self.lengths[first : first + int(counts(self.records[i : i + 1])[0])]


def find_fault(data: bytes, head: int, lengths: npt.NDArray[np.uint16]) -> str | None:
    """Check that a JPEG stream consists of the given segments, each followed by its marker.

    Args:
        data: The stream.
        head: Offset of the first entropy-coded byte.
        lengths: uint16 (segments,), bytes of each segment.

    Returns:
        A description of the first fault, or None.
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
    # Inside a segment, FF is always followed by 00.
    marks = np.flatnonzero((stream[head:-1] == 0xFF) & (stream[head + 1 :] != 0)) + head
    if not np.array_equal(marks, ends):
        return f"expected {len(ends)} markers, found {len(marks)}"
    return None


class SegmentsWriter:
    """Writes a side file, one sample after another. `finish` completes the file."""

    def __init__(self, path: Path, *, capacity: int) -> None:
        """Create the file.

        Args:
            path: Path of the file, which must not exist.
            capacity: Largest number of samples.

        Raises:
            OSError: The file cannot be created.
        """
        self.path = path
        self._records = np.zeros(capacity, RECORD)
        self._count = 0
        self._lengths = 0
        self._sum = 0  # CRC-32 of the lengths written so far.
        self._file: BinaryIO = open(path, "xb", buffering=_BUFFER)
        self._file.seek(HEADER.itemsize)

    def add(self, cuts: RestartLayout | None) -> None:
        """Append one sample. None means that it cannot be cut."""
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
        """Write records and header, and sync to disk.

        Args:
            fingerprint: `Beton.fingerprint` of the beton.
        """
        self._file.write(bytes(-self._file.tell() % 8))
        self._file.write(self._records[: self._count].tobytes())
        header = np.zeros(1, HEADER)
        header[0] = (MAGIC, VERSION, 0, fingerprint.encode(), self._count, self._lengths)
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        # Drop the page cache, so that a check reads the disk.
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def check(self, found: Segments) -> None:
        """Compare the data read back with the data written.

        Raises:
            BetonError: They differ.
        """
        same = np.array_equal(found.records, self._records[: self._count])
        if not same or zlib.crc32(found.lengths.data) != self._sum:
            raise BetonError(f"{self.path}: data read back differs from data written")

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()


def open_segments(path: Path, layout: Layout) -> Segments:
    """Map a side file and check its structure.

    Args:
        path: Path of the side file.
        layout: Layout of the beton; fingerprint, number of samples and image sizes must match.

    Raises:
        BetonError: The file is damaged, or belongs to another beton.
        OSError: The file cannot be read.
    """
    size = path.stat().st_size
    if size < HEADER.itemsize:
        raise BetonError(
            f"{path}: byte 0: expected a header of {HEADER.itemsize} bytes, found a file of {size}"
        )
    with open(path, "rb", buffering=0) as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
    return _SegmentsChecker(path, data).segments(layout)


class _SegmentsChecker(Checker):
    """Checks of one side file, in blocks of records."""

    def segments(self, layout: Layout) -> Segments:
        """Run all checks."""
        data = self.data
        samples, total = len(layout.sizes), self._head(layout)
        place = HEADER.itemsize + 2 * total
        place += -place % 8
        if place + samples * RECORD.itemsize != len(data):
            raise self.fail("byte 40", f"lengths and {samples} records in {len(data)} bytes", total)
        records, first = data[place:].view(RECORD), 0
        for block in row_blocks(samples):
            part = records[block]
            first = self._block(part, layout, block, first)
            drop_pages(data, part)
        if first != total:
            raise self.fail("byte 40", f"{first} lengths", total)
        lengths = data[HEADER.itemsize : HEADER.itemsize + 2 * total].view("<u2")
        return Segments(records=records, lengths=lengths)

    def _head(self, layout: Layout) -> int:
        """Check the header. Returns the number of lengths."""
        header = self.data[: HEADER.itemsize].view(HEADER)[0]
        if header["magic"] != MAGIC or header["version"] != VERSION:
            found = f"{bytes(header['magic'])!r}, version {header['version']}"
            raise self.fail("byte 0", f"{MAGIC!r}, version {VERSION}", found)
        if header["fingerprint"] != layout.fingerprint.encode():
            found = bytes(header["fingerprint"]).decode("ascii", "backslashreplace")
            raise self.fail("byte 16", f"the side file of beton {layout.fingerprint}", found)
        if header["samples"] != len(layout.sizes):
            expected = f"{len(layout.sizes)} samples as in the beton"
            raise self.fail("byte 32", expected, header["samples"])
        return int(header["lengths"])

    def _block(self, part: npt.NDArray[np.void], layout: Layout, block: slice, first: int) -> int:
        """Check a block of records whose lengths start at `first`. Returns where they end."""
        # Contiguous copies of the fields: strided views take twice as long.
        get = {name: part[name].copy() for name in RECORD.names or ()}
        interval, columns, rows = get["interval"], get["columns"], get["rows"]
        uncut = interval == 0

        def check(fine: Bool, expected: str, key: str) -> None:
            self.check_rows(fine, expected, get[key], block)

        check(uncut | ((columns > 0) & (rows > 0)), "a grid of MCUs", "columns")
        per_row, rest = np.divmod(columns, np.maximum(interval, 1))
        check(uncut | (rest == 0), "an interval that divides its columns", "interval")
        for key in ("mcu_width", "mcu_height"):
            side = get[key]
            fine = (side == 8) | (side == 16) | (side == 32)
            check(uncut | fine, f"{key} 8, 16 or 32", key)
        # Unsigned 32 bits do not underflow: the frame is known to come before the head.
        inside = (get["frame"] > 0) & (get["frame"] < get["head"])
        inside &= get["head"] - get["frame"] >= 4
        check(uncut | inside, "a frame header before the scan", "frame")
        short = uncut | (get["head"] < layout.sizes[block])
        check(short, "a head below the sample's size", "head")
        per_row[uncut] = 0
        ends = first + np.cumsum(rows.astype(np.uint32) * per_row, dtype=np.uint64)
        starts = np.concatenate((np.array([first], np.uint64), ends[:-1]))
        check(get["first"] == starts, "lengths that follow one another", "first")
        height, width = np.maximum(get["mcu_height"], 1), np.maximum(get["mcu_width"], 1)
        fits = (layout.heights[block] + (height - np.int32(1))) // height == rows
        fits &= (layout.widths[block] + (width - np.int32(1))) // width == columns
        fits &= layout.modes[block] != RAW
        fits |= uncut
        if not fits.all():
            i = int(np.argmin(fits))
            at = block.start + i
            raise self.fail(
                f"sample {at}",
                f"MCUs for {layout.heights[at]} x {layout.widths[at]} pixels",
                f"{rows[i]} x {columns[i]} of {height[i]} x {width[i]}",
            )
        return int(ends[-1])
