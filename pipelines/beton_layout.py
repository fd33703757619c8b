"""The layout of FFCV's beton format, version 2, and every check that needs no payload.

Header, field table, metadata rows, pages of samples, allocation table. All checks are array
operations: fourteen million samples take seconds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.jpeg import MAX_PIXELS

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

VERSION = 2
MIN_PAGE = 1 << 21
TYPE_IDS = {"image": 2, "label": 1}
_TYPES = {"image": IMAGE, "label": LABEL}
_MAX_LABEL = 1 << 31

Array = npt.NDArray[Any]


class BetonError(ValueError):
    """A beton that must not be used; one line naming file, place, expected and found."""


def metadata_type(fields: tuple[str, ...]) -> np.dtype[Any]:
    """Type of one metadata row, laid out as ffcv.types.get_metadata_type does."""
    return np.dtype([(name, _TYPES[name]) for name in fields], align=True)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where everything is in a file that passed every check; arrays by sample id."""

    offsets: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint64]
    heights: npt.NDArray[np.int32]
    widths: npt.NDArray[np.int32]
    modes: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    fields: tuple[str, ...]
    page_size: int
    fingerprint: str


def check_layout(
    path: Path,
    data: npt.NDArray[np.uint8],
    *,
    samples: int | None = None,
    classes: int | None = None,
) -> Layout:
    """Check all of a mapped beton but its payload.

    Args:
        path: Named in errors.
        data: (bytes,): the whole file, at least a header long.
        samples: How many there must be; None takes the file's word.
        classes: How many label values there are; None takes any that is plausible.

    Raises:
        BetonError: At the first check that fails.
    """
    return _Checker(path, data).layout(samples, classes)


class _Checker:
    """Checks of one mapped file, in the order in which the parts depend on one another."""

    def __init__(self, path: Path, data: npt.NDArray[np.uint8]) -> None:
        self.path = path
        self.data = data

    def fail(self, place: str, expected: object, found: object) -> BetonError:
        """The error of a check that failed."""
        return BetonError(f"{self.path}: {place}: expected {expected}, found {found}")

    def layout(self, samples: int | None, classes: int | None) -> Layout:
        """Run all checks."""
        header = self.data[: HEADER.itemsize].view(HEADER)[0]
        fields, rows, meta_end = self._head(header)
        count, page = len(rows), int(header["page_size"])
        table = self._alloc_table(int(header["alloc_table_ptr"]), count, meta_end, page)
        offsets, sizes = self._allocation(table, count, meta_end, page)
        image = rows["image"]
        self._all(image["data_ptr"] == offsets, "data_ptr as allocated", image["data_ptr"])
        modes = image["mode"].copy()
        self._all(modes <= 1, "mode 0 or 1", modes)
        heights, widths = image["height"].astype(np.int32), image["width"].astype(np.int32)
        self._all((heights > 0) & (widths > 0), "width and height above 0", widths)
        pixels = heights.astype(np.int64) * widths
        self._all(pixels <= MAX_PIXELS, f"at most {MAX_PIXELS} pixels", pixels)
        raw = modes == 1
        if raw.any():
            exact = ~raw | (sizes == 3 * pixels.astype(np.uint64))
            self._all(exact, "3 bytes a pixel in a raw sample", sizes)
        labels = self._labels(rows, fields, samples, classes)
        digest = hashlib.sha256(self.data[:meta_end].data)
        digest.update(self.data[int(header["alloc_table_ptr"]) :].data)
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
        """Header, field table, and where the metadata rows are."""
        if header["version"] != VERSION:
            raise self.fail("byte 0", f"version {VERSION}", f"{header['version']} (no beton?)")
        num_fields, count = int(header["num_fields"]), int(header["num_samples"])
        page, table = int(header["page_size"]), int(header["alloc_table_ptr"])
        if num_fields not in (1, 2):
            raise self.fail("byte 2", "1 or 2 fields", num_fields)
        if page < MIN_PAGE or page & (page - 1):
            raise self.fail("byte 4", f"a page size that is a power of two >= {MIN_PAGE}", page)
        if not count:
            raise self.fail("byte 8", "at least one sample", 0)
        if not table:
            raise self.fail("byte 16", "the allocation table's place", "0: the writer died")
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
            raise self.fail("byte 16", f"an end of whole pages of {page} from {start}", table)
        return self.data[table:].view(ALLOC)

    def _allocation(
        self, table: Array, count: int, meta_end: int, page: int
    ) -> tuple[Array, Array]:
        """Offsets and sizes by sample id."""
        ids, ptr, size = table["sample_id"], table["ptr"].copy(), table["size"].copy()
        start, end = -(-meta_end // page) * page, len(self.data) - table.nbytes
        row = "row of the allocation table"
        self._all(ids < count, f"a sample below {count}", ids, row)
        ordered = bool((ids == np.arange(count, dtype=np.uint64)).all())
        if not ordered:
            seen = np.zeros(count, np.bool_)
            seen[ids.astype(np.int64)] = True
            self._all(seen, "one place for each sample", seen)
        self._all((size > 0) & (size <= page), f"a size from 1 to {page}", size, row)
        self._all((ptr >= start) & (ptr < end), f"a place in {start}..{end}", ptr, row)
        last = ptr + size - np.uint64(1)
        shift = np.uint64(page.bit_length() - 1)
        self._all(last >> shift == ptr >> shift, f"a sample in one page of {page}", ptr, row)
        self._all(last < end, f"an end of at most {end}", last, row)
        if (ptr[1:] > last[:-1]).all():
            pass  # In file order, as most writers leave it: no sort needed.
        else:
            order = np.argsort(ptr)
            apart = np.ones(count, np.bool_)
            apart[order[1:]] = ptr[order[1:]] > last[order[:-1]]
            self._all(apart, "samples that do not overlap", ptr, row)
        if ordered:
            return ptr, size
        offsets, sizes = np.empty_like(ptr), np.empty_like(size)
        offsets[ids], sizes[ids] = ptr, size
        return offsets, sizes

    def _labels(
        self, rows: Array, fields: tuple[str, ...], samples: int | None, classes: int | None
    ) -> npt.NDArray[np.int64]:
        count = len(rows)
        if samples is not None and samples != count:
            raise self.fail("byte 8", f"{samples} samples as in the manifest", count)
        if "label" not in fields:
            return np.full(count, -1, np.int64)
        labels = rows["label"].astype(np.int64)
        limit = _MAX_LABEL if classes is None else classes
        self._all((labels >= -1) & (labels < limit), f"a label in -1..{limit - 1}", labels)
        return labels

    def _all(self, fine: Array, expected: str, found: Array, what: str = "sample") -> None:
        """Fail at the first element that is not fine."""
        if not fine.all():
            i = int(np.argmin(fine))
            raise self.fail(f"{what} {i}", expected, found[i])
