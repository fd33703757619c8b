"""A beton of any number of samples, made in a second: full tables, no payload.

For measuring what grows with the number of samples: opening, orders, memory. The samples' pages and
the segment lengths in the side file are holes in sparse files, so no sample can be decoded.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.beton.layout import ALLOC, FIELD, HEADER, TYPE_IDS, VERSION, metadata_type
from pipelines.beton.segments import HEADER as SIDE_HEADER
from pipelines.beton.segments import MAGIC, RECORD, segments_path
from pipelines.beton.segments import VERSION as SIDE_VERSION

FIELDS = ("image", "label")
PAGE = 1 << 23
CLASSES = 1000
_BLOCK = 1 << 18
_MCU = 16  # Pixels.


def write_sparse(path: Path, samples: int, *, size: int = 110_000, shuffled: bool = False) -> Path:
    """Write a beton with complete header, metadata and allocation table, and its side file.

    Args:
        path: The file to write or replace. With its side file it needs 72 bytes of disk per sample.
        samples: Number of samples.
        size: Bytes of each sample, at most a page of 8 MiB.
        shuffled: Write the allocation table in random order; writers sort it by position.

    Returns:
        `path`.
    """
    kind = metadata_type(FIELDS)
    head = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
    first = -(-(head + samples * kind.itemsize) // PAGE) * PAGE
    per_page = PAGE // size
    table = first + -(-samples // per_page) * PAGE
    header, fields = np.zeros(1, HEADER), np.zeros(len(FIELDS), FIELD)
    header[0] = (VERSION, len(FIELDS), PAGE, samples, table)
    for entry, name in zip(fields, FIELDS, strict=True):
        entry["type_id"] = TYPE_IDS[name]
        entry["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    rng = np.random.default_rng(0)
    order = np.random.default_rng(1).permutation(samples) if shuffled else np.arange(samples)
    digest, records = hashlib.sha256(header.tobytes() + fields.tobytes()), np.zeros(samples, RECORD)
    with path.open("wb") as file:
        file.write(header.tobytes() + fields.tobytes())
        for start in range(0, samples, _BLOCK):
            ids = np.arange(start, min(start + _BLOCK, samples))
            rows = np.zeros(len(ids), kind)
            rows["image"]["width"] = rng.integers(200, 600, len(ids))
            rows["image"]["height"] = rng.integers(200, 600, len(ids))
            rows["image"]["data_ptr"] = first + ids // per_page * PAGE + ids % per_page * size
            rows["label"] = rng.integers(0, CLASSES, len(ids))
            file.write(rows.tobytes())
            digest.update(rows.tobytes())
            records["columns"][ids] = -(-rows["image"]["width"].astype(int) // _MCU)
            records["rows"][ids] = -(-rows["image"]["height"].astype(int) // _MCU)
        file.seek(table)
        for start in range(0, samples, _BLOCK):
            ids = order[start : start + _BLOCK]
            entries = np.zeros(len(ids), ALLOC)
            entries["sample_id"], entries["size"] = ids, size
            entries["ptr"] = first + ids // per_page * PAGE + ids % per_page * size
            file.write(entries.tobytes())
            digest.update(entries.tobytes())
        os.fsync(file.fileno())
    _write_segments(path, records, digest.hexdigest()[:16])
    return path


def _write_segments(path: Path, records: npt.NDArray[np.void], fingerprint: str) -> None:
    """Write the side file; each row of MCUs is one segment."""
    records["interval"] = records["columns"]
    records["head"], records["frame"] = 623, 163
    records["mcu_width"] = records["mcu_height"] = _MCU
    ends = np.cumsum(records["rows"], dtype=np.uint64)
    records["first"][1:] = ends[:-1]
    header = np.zeros(1, SIDE_HEADER)
    header[0] = (MAGIC, SIDE_VERSION, 0, fingerprint.encode(), len(records), ends[-1])
    with segments_path(path).open("wb") as file:
        file.write(header.tobytes())
        file.seek(-(-(SIDE_HEADER.itemsize + 2 * int(ends[-1])) // 8) * 8)
        records.tofile(file)
        os.fsync(file.fileno())
