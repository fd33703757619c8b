"""Writer of beton files, which reads back what it has written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.beton.layout import (
    ALLOC,
    FIELD,
    HEADER,
    MIN_PAGE,
    TYPE_IDS,
    VERSION,
    BetonError,
    metadata_type,
)
from pipelines.beton.reader import Beton, check_sums
from pipelines.beton.segments import SegmentsWriter, segments_path

if TYPE_CHECKING:
    from pipelines.jpeg.restart_markers import RestartLayout


FIELDS = ("image", "label")
MAX_PAGE = 1 << 31
_BLOCK = 1 << 24
_BUFFER = 1 << 20


class PageTooSmall(Exception):
    """A sample is larger than a page; `size` is its length in bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(f"a sample of {size} bytes does not fit into a page")
        self.size = size


def page_for(size: int, *, least: int = MIN_PAGE) -> int:
    """Return the smallest power of two that is at least `least` and at least `size` bytes."""
    return max(least, 1 << max(size - 1, 0).bit_length())


class BetonWriter:
    """Writes a beton, and its side file if wanted. A context manager that closes them."""

    def __init__(self, path: Path, *, capacity: int, page_size: int, segments: bool) -> None:
        """Create the files.

        Args:
            path: Path of the beton, which must not exist.
            capacity: Largest number of samples.
            page_size: Bytes in a page.
            segments: Whether to write a side file, which tells where samples can be cut.

        Raises:
            ValueError: `page_size` is not a power of two in the allowed range.
            OSError: They cannot be created.
        """
        if page_size < MIN_PAGE or page_size > MAX_PAGE or page_size & (page_size - 1):
            raise ValueError(f"page_size must be a power of two in {MIN_PAGE}..{MAX_PAGE}")
        self.path = path
        self.page_size = page_size
        self.count = 0
        self._rows = np.zeros(capacity, metadata_type(FIELDS))
        self._table = np.zeros(capacity, ALLOC)
        self._sums = np.zeros(capacity, np.uint32)
        head = HEADER.itemsize + len(FIELDS) * FIELD.itemsize + self._rows.nbytes
        self._next = -(-head // page_size) * page_size
        self._used = 0  # Bytes used in the page that starts at `_next`.
        self._segments: SegmentsWriter | None = None
        self._file = open(path, "xb", buffering=_BUFFER)
        try:
            self._file.seek(self._next)
            if segments:
                self._segments = SegmentsWriter(segments_path(path), capacity=capacity)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            self._file.close()
            if self._segments is not None:
                self._segments.close()
        except OSError:
            if error is None:  # Otherwise a full disk has been reported already.
                raise

    def add(
        self,
        data: bytes,
        *,
        height: int,
        width: int,
        label: int,
        crc32: int,
        cuts: RestartLayout | None,
    ) -> None:
        """Append one JPEG stream, and its record to the side file.

        Args:
            data: The JPEG stream.
            height: Height of the image.
            width: Width of the image.
            label: Class id; -1 without a label.
            crc32: CRC-32 of `data`.
            cuts: Where the stream can be cut; None if it cannot.

        Raises:
            PageTooSmall: The stream is larger than a page. Nothing was added.
            OSError: The disk is full or broken.
        """
        if len(data) > self.page_size:
            raise PageTooSmall(len(data))
        if self._used + len(data) > self.page_size:
            self._end_page()
        place = self._next + self._used
        self._file.write(data)
        self._used += len(data)
        self._rows[self.count] = ((0, width, height, place), label)
        self._table[self.count] = (self.count, place, len(data))
        self._sums[self.count] = crc32
        if self._segments is not None:
            self._segments.add(cuts)
        self.count += 1

    def finish(self) -> tuple[Beton, str]:
        """Write the tables, sync to disk, read everything back and compare.

        Returns:
            The open and verified file, which the caller closes, and its SHA-256.

        Raises:
            BetonError: The data or the side file read back differ from those written.
            OSError: The disk is full or broken.
        """
        self._end_page()
        table = self._file.tell()
        allocation = self._table[: self.count].tobytes()
        self._file.write(allocation)
        header, fields = np.zeros(1, HEADER), np.zeros(len(FIELDS), FIELD)
        header[0] = (VERSION, len(FIELDS), self.page_size, self.count, table)
        for entry, name in zip(fields, FIELDS, strict=True):
            entry["type_id"] = TYPE_IDS[name]
            entry["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        head = header.tobytes() + fields.tobytes() + self._rows[: self.count].tobytes()
        self._file.seek(0)
        self._file.write(head)
        self._file.flush()
        os.fsync(self._file.fileno())
        # Drop the page cache, so that the check below reads the disk.
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if self._segments is not None:
            # Equal to `Beton.fingerprint`: opening compares the two.
            self._segments.finish(hashlib.sha256(head + allocation).hexdigest()[:16])
        beton = Beton.open(self.path)
        try:
            check_sums(beton, self.sums)
            if not np.array_equal(beton.labels, self._rows["label"][: self.count]):
                raise BetonError(f"{self.path}: labels read back differ from those written")
            if self._segments is not None and beton.segments is not None:
                self._segments.check(beton.segments)
            digest = hashlib.sha256()
            for start in range(0, len(beton.data), _BLOCK):
                digest.update(beton.data[start : start + _BLOCK].data)
        except BaseException:
            beton.close()
            raise
        return beton, digest.hexdigest()

    @property
    def sums(self) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        """uint32 (count,): CRC-32 of each sample added."""
        return self._sums[: self.count]

    def _end_page(self) -> None:
        """Fill the rest of the current page with zeros."""
        if self._used:
            left = self.page_size - self._used
            for start in range(0, left, _BUFFER):
                self._file.write(bytes(min(_BUFFER, left - start)))
            self._next += self.page_size
            self._used = 0
