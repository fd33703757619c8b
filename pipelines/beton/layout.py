"""Byte layout of FFCV's beton format, version 2, and all checks that do not read the payload.

Header, field table, metadata rows, pages of samples, allocation table. The checks are array
operations on blocks of rows that fit the processor's cache. Each block is hashed in the same pass.
Fourteen million samples take about two seconds, and little more memory than the arrays returned.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.arrays import Int32, Int64, Uint8, Uint64
from pipelines.beton.manifest import Manifest
from pipelines.jpeg.markers import MAX_PIXELS

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
ALLOC = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
"""Metadata of FFCV's RGBImageField."""
LABEL = np.dtype("<i8")
"""Metadata of FFCV's IntField."""
RAW = 1
"""Mode of raw RGB pixels. Stock FFCV writes them, we do not. 0 is a JPEG stream."""

VERSION = 2
MIN_PAGE = 1 << 21
TYPE_IDS = {"image": 2, "label": 1}
_TYPES = {"image": IMAGE, "label": LABEL}
_MAX_LABEL = 1 << 31
_BLOCK = 1 << 16  # rows checked at once, about 1.5 MB of the file

Array = npt.NDArray[Any]


class BetonError(ValueError):
    """An invalid beton or side file. The message is one line: file, place, expected and found."""


def metadata_type(fields: tuple[str, ...]) -> np.dtype[Any]:
    """Return the dtype of a metadata row, laid out as by ffcv.types.get_metadata_type."""
    return np.dtype([(name, _TYPES[name]) for name in fields], align=True)


@dataclass(frozen=True, eq=False)
class Layout:
    """Tables of a file that passed all checks; arrays are by sample id."""

    offsets: Uint64
    """(N,): start of each sample in the file."""
    sizes: Uint64
    """(N,): length of each sample in bytes."""
    heights: Int32
    """(N,): height of each image."""
    widths: Int32
    """(N,): width of each image."""
    modes: Uint8
    """(N,): 0 JPEG stream, `RAW` raw RGB pixels."""
    labels: Int64
    """(N,): class ids, -1 without labels."""
    fields: tuple[str, ...]
    """Field names, in the order of the file."""
    page_size: int
    """Bytes in a page. No sample crosses a page boundary."""
    fingerprint: str
    """Identifies the data set: the first 16 hex digits of the SHA-256 of header, field table,
    metadata and allocation table."""


def check_layout(path: Path, data: Uint8, manifest: Manifest | None) -> Layout:
    """Check all of a mapped beton except its payload.

    Args:
        path: Path for error messages.
        data: uint8 (bytes,), the whole file, at least as long as a header.
        manifest: Gives the number of samples and of classes. None accepts any plausible ones.

    Raises:
        BetonError: A check failed. Describes the first failure.
    """
    return _LayoutChecker(path, data).layout(manifest)


class Checker:
    """Checks of one mapped file."""

    def __init__(self, path: Path, data: Uint8) -> None:
        self.path, self.data = path, data

    def fail(self, place: str, expected: object, found: object) -> BetonError:
        """Return the error for a failed check."""
        return BetonError(f"{self.path}: {place}: expected {expected}, found {found}")

    def check_rows(
        self, fine: Array, expected: str, found: Array, block: slice, what: str = "sample"
    ) -> None:
        """Raise for the first row of a block that is not fine."""
        if not fine.all():
            i = int(np.argmin(fine))
            raise self.fail(f"{what} {block.start + i}", expected, found[i])


class _LayoutChecker(Checker):
    """Checks of a beton, in the order in which its parts depend on one another."""

    def layout(self, manifest: Manifest | None) -> Layout:
        """Run all checks."""
        header = self.data[: HEADER.itemsize].view(HEADER)[0]
        fields, rows, meta_end = self._head(header)
        count, page, start = len(rows), int(header["page_size"]), int(header["alloc_table_ptr"])
        if manifest is not None and manifest.samples != count:
            raise self.fail("byte 8", f"{manifest.samples} samples as in the manifest", count)
        table = self._alloc_table(start, count, meta_end, page)
        digest = hashlib.sha256(self.data[: meta_end - rows.nbytes].data)
        limit = _MAX_LABEL if manifest is None else len(manifest.classes)
        modes, heights, widths, labels = self._metadata(rows, limit, digest)
        offsets, sizes = self._allocation(table, meta_end, page, digest)
        for block in row_blocks(count):
            part = rows[block]
            place = part["image"]["data_ptr"].copy()
            self.check_rows(place == offsets[block], "data_ptr as allocated", place, block)
            raw = 3 * heights[block].astype(np.uint64) * widths[block].astype(np.uint64)
            exact = (modes[block] != RAW) | (sizes[block] == raw)
            self.check_rows(exact, "3 bytes per pixel in a raw sample", sizes[block], block)
            drop_pages(self.data, part)
        return Layout(
            offsets=offsets,
            sizes=sizes,
            heights=heights,
            widths=widths,
            modes=modes,
            labels=labels,
            fields=fields,
            page_size=page,
            fingerprint=digest.hexdigest()[:16],
        )

    def _head(self, header: Any) -> tuple[tuple[str, ...], Array, int]:
        """Check header and field table. Returns field names, metadata rows and the rows' end."""
        if header["version"] != VERSION:
            raise self.fail("byte 0", f"version {VERSION}", f"{header['version']} (not a beton?)")
        num_fields, count = int(header["num_fields"]), int(header["num_samples"])
        page, table = int(header["page_size"]), int(header["alloc_table_ptr"])
        if num_fields not in (1, 2):
            raise self.fail("byte 2", "1 or 2 fields", num_fields)
        if page < MIN_PAGE or page & (page - 1):
            raise self.fail("byte 4", f"a page size that is a power of two >= {MIN_PAGE}", page)
        if not count:
            raise self.fail("byte 8", "at least one sample", 0)
        if not table:
            raise self.fail("byte 16", "the position of the allocation table", "0: the writer died")
        if table > len(self.data):
            raise self.fail("byte 16", f"an allocation table below {len(self.data)}", table)
        start = HEADER.itemsize + num_fields * FIELD.itemsize
        if start > table:
            raise self.fail("byte 2", "a field table before the allocation table", num_fields)
        fields = self._fields(self.data[HEADER.itemsize : start].view(FIELD))
        kind = metadata_type(fields)
        end = start + count * kind.itemsize
        if end > table:
            raise self.fail(
                "byte 8", f"at most {(table - start) // kind.itemsize} samples of metadata", count
            )
        return fields, self.data[start:end].view(kind), end

    def _fields(self, descriptors: Array) -> tuple[str, ...]:
        fields = []
        for n, entry in enumerate(descriptors):
            place = f"byte {HEADER.itemsize + n * FIELD.itemsize}, field {n}"
            name = entry["name"].tobytes().rstrip(b"\0").decode("ascii", "backslashreplace")
            if name not in TYPE_IDS or name in fields:
                raise self.fail(place, "fields named 'image' and 'label'", repr(name))
            if entry["type_id"] != TYPE_IDS[name]:
                raise self.fail(place, f"type {TYPE_IDS[name]} of {name!r}", entry["type_id"])
            fields.append(name)
        if "image" not in fields:
            raise self.fail(f"byte {HEADER.itemsize}", "a field named 'image'", fields)
        return tuple(fields)

    def _alloc_table(self, table: int, count: int, meta_end: int, page: int) -> Array:
        left, start = len(self.data) - table, -(-meta_end // page) * page
        if left != count * ALLOC.itemsize:
            raise self.fail(
                f"byte {table}", f"an allocation table of {count * ALLOC.itemsize} bytes", left
            )
        if table < start or (table - start) % page:
            raise self.fail("byte 16", f"whole pages of {page} bytes from {start}", table)
        return self.data[table:].view(ALLOC)

    def _metadata(
        self, rows: Array, limit: int, digest: hashlib._Hash
    ) -> tuple[Array, Array, Array, Array]:
        """Return modes, heights, widths and labels by sample id; add the rows to the digest."""
        count, labelled = len(rows), "label" in (rows.dtype.names or ())
        modes, labels = np.empty(count, np.uint8), np.full(count, -1, np.int64)
        heights, widths = np.empty(count, np.int32), np.empty(count, np.int32)
        for block in row_blocks(count):
            part = rows[block]
            digest.update(part.view(np.uint8).data)
            image = part["image"]
            mode, h, w = image["mode"].copy(), image["height"].copy(), image["width"].copy()
            self.check_rows(mode <= 1, "mode 0 or 1", mode, block)
            self.check_rows((h > 0) & (w > 0), "width and height above 0", w, block)
            pixels = h.astype(np.int64) * w
            self.check_rows(pixels <= MAX_PIXELS, f"at most {MAX_PIXELS} pixels", pixels, block)
            modes[block], heights[block], widths[block] = mode, h, w
            if labelled:
                label = part["label"].copy()
                fine = (label >= -1) & (label < limit)
                self.check_rows(fine, f"a label in -1..{limit - 1}", label, block)
                labels[block] = label
            drop_pages(self.data, part)
        return modes, heights, widths, labels

    def _allocation(
        self, table: Array, meta_end: int, page: int, digest: hashlib._Hash
    ) -> tuple[Array, Array]:
        """Return offsets and sizes by sample id; add the table to the digest."""
        count, what = len(table), "row of the allocation table"
        start, end = -(-meta_end // page) * page, len(self.data) - table.nbytes
        shift = np.uint64(page.bit_length() - 1)
        # full, not zeros: numpy requests huge pages only for full. Allocating small pages takes
        # longer than all the checks.
        offsets, sizes = np.empty(count, np.uint64), np.full(count, 0, np.uint64)
        for block in row_blocks(count):
            part = table[block]
            digest.update(part.view(np.uint8).data)
            ids, ptr, size = (part[name].copy() for name in ALLOC.names or ())
            self.check_rows(ids < count, f"a sample below {count}", ids, block, what)
            fits = (size > 0) & (size <= page)
            self.check_rows(fits, f"a size from 1 to {page}", size, block, what)
            inside = (ptr >= start) & (ptr < end)
            self.check_rows(inside, f"an offset in {start}..{end}", ptr, block, what)
            last = ptr + size - np.uint64(1)
            one_page = last >> shift == ptr >> shift
            self.check_rows(one_page, f"a sample in one page of {page}", ptr, block, what)
            self.check_rows(last < end, f"an end of at most {end}", last, block, what)
            ids = ids.view(np.int64)  # numpy's index type: no conversion
            offsets[ids], sizes[ids] = ptr, size
            drop_pages(self.data, part)
        self.check_rows(sizes > 0, "one allocation per sample", sizes, slice(0, count))
        self._check_overlap(offsets, sizes)
        return offsets, sizes

    def _check_overlap(self, offsets: Array, sizes: Array) -> None:
        """Check that no two samples overlap."""
        ends = offsets + sizes
        if (offsets[1:] >= ends[:-1]).all():
            return  # Ordered by id, as most writers leave them: no sort is needed.
        # Sort starts and ends separately, which is faster than sorting pairs. If two samples
        # overlap, two starts lie before an end, so some start lies before the preceding end.
        starts = np.sort(offsets)
        ends.sort()
        if (starts[1:] >= ends[:-1]).all():
            return
        order = np.argsort(offsets, kind="stable")
        clash = offsets[order[1:]] < (offsets + sizes)[order[:-1]]
        i, j = (int(order[int(np.argmax(clash)) + k]) for k in (0, 1))
        raise self.fail(f"sample {j}", f"an offset after sample {i}", offsets[j])


def row_blocks(count: int) -> Iterator[slice]:
    """Return slices that cover [0, count): the rows of each are checked at once."""
    return (slice(i, min(i + _BLOCK, count)) for i in range(0, count, _BLOCK))


def drop_pages(data: Array, part: Array) -> None:
    """Release the memory of a part of a mapped file that is not read again soon.

    Args:
        data: uint8 (bytes,), the whole file, as returned by `numpy.frombuffer` of a mapping.
        part: A view into `data`, of any shape.
    """
    view: Any = data.base
    if isinstance(view, memoryview) and isinstance(view.obj, mmap.mmap):
        start = part.ctypes.data - data.ctypes.data
        before = start % mmap.PAGESIZE
        view.obj.madvise(mmap.MADV_DONTNEED, start - before, part.nbytes + before)
