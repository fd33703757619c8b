"""Reader of beton files, with numpy alone. A file opens only if all structural checks pass.

The format is FFCV's, version 2: header, field table, metadata, pages of samples, allocation table.
FFCV itself trains on wrong images if a file is damaged in most ways, so every engine opens it here
first.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import weakref
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.arrays import Uint8, Uint32
from pipelines.beton.layout import HEADER, RAW, BetonError, Layout, check_layout
from pipelines.beton.manifest import Manifest, load_manifest, manifest_path
from pipelines.beton.segments import Segments, find_fault, open_segments, segments_path
from pipelines.jpeg.markers import ImageError, read_header

__all__ = ["Beton", "BetonError", "VerifyReport", "check_sums", "verify"]


@dataclass(frozen=True, eq=False)
class Beton(Layout):
    """An open and checked beton, a `pipelines.samples.Samples`.

    Holds a shared lock on the file until closed or collected.
    """

    path: Path
    """Path of the file."""
    data: Uint8
    """(bytes,): the file, memory-mapped read-only."""
    classes: tuple[str, ...]
    """Class names from the manifest; empty without a manifest."""
    manifest: Manifest | None
    """The manifest next to the file; None if there is none."""
    segments: Segments | None = None
    """Where each sample can be cut, read from the side file; None if there is none."""
    _closer: list[weakref.finalize[..., Any]] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def beton(self) -> Beton:
        """The beton itself."""
        return self

    @property
    def raw(self) -> bool:
        """Whether any sample is raw pixels."""
        return bool((self.modes == RAW).any())

    def payload(self, i: int) -> Uint8:
        """Return the bytes of sample `i`, uint8 (bytes,): a view of the mapped file, not a copy.

        Raises:
            IndexError: The file has no sample `i`.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} is not in 0..{len(self) - 1}")
        start = int(self.offsets[i])
        return self.data[start : start + int(self.sizes[i])]

    def read(self, i: int) -> Uint8:
        """Return a view of sample `i`: a JPEG stream, uint8 (bytes,), or pixels, (H, W, 3)."""
        stored = self.payload(i)
        if self.modes[i] == RAW:
            return stored.reshape(int(self.heights[i]), int(self.widths[i]), 3)
        return stored

    def name(self, i: int) -> str:
        """Return the name of the file, and the number of sample `i`."""
        return f"{self.path.name}: sample {i}"

    def location(self, i: int) -> str:
        """Return the path of the file, and the number of sample `i`."""
        return f"{self.path}: sample {i}"

    def size(self, i: int) -> int:
        """Return the length of sample `i` in bytes."""
        return int(self.sizes[i])

    def describe(self) -> dict[str, object]:
        """Describe the data set in JSON types, without absolute paths."""
        return {"kind": "beton", "fingerprint": self.fingerprint, "samples": len(self)}

    def close(self) -> None:
        """Release the lock. Views of the data remain valid."""
        for closer in self._closer:
            closer()

    def __enter__(self) -> Beton:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Beton:
        """Map a beton and run all checks that do not read its payload.

        Raises:
            BetonError: The file, its manifest or its side file is invalid, or is being written.
            FileNotFoundError: The file does not exist.
        """
        return _open(Path(path))


@dataclass(frozen=True)
class VerifyReport:
    """Counts of what `verify` checked."""

    samples: int
    """Samples in the file."""
    jpegs: int
    """Samples that are JPEG streams; the others are raw pixels."""
    labelled: int
    """Samples with a label."""
    payload_bytes: int
    """Total size of all samples."""
    checksums: bool
    """Whether the checksums of all samples were compared, which needs a manifest."""


def verify(path: str | os.PathLike[str]) -> VerifyReport:
    """Open a beton and check every sample: JPEG markers, sizes, checksums and segments.

    Raises:
        BetonError: A sample disagrees with the metadata, manifest or side file. Names the first.
        FileNotFoundError: The file does not exist.
    """
    with Beton.open(path) as beton:
        sums = beton.manifest.crc32 if beton.manifest is not None else None
        if sums is not None:
            check_sums(beton, sums)
        for i in np.flatnonzero(beton.modes == 0):
            _check_jpeg(beton, int(i))
        return VerifyReport(
            samples=len(beton),
            jpegs=int((beton.modes == 0).sum()),
            labelled=int((beton.labels >= 0).sum()),
            payload_bytes=int(beton.sizes.sum()),
            checksums=sums is not None,
        )


def check_sums(beton: Beton, sums: Uint32) -> None:
    """Compare the CRC-32 of every sample.

    Args:
        beton: The open file.
        sums: uint32 (N,), expected checksums.

    Raises:
        BetonError: A checksum differs. Names the first such sample.
    """
    for i, expected in enumerate(sums.tolist()):
        found = zlib.crc32(beton.payload(i).data)
        if found != expected:
            raise BetonError(
                f"{beton.path}: sample {i} at byte {beton.offsets[i]}: expected CRC-32 "
                f"{expected:08x}, found {found:08x}"
            )


def _check_jpeg(beton: Beton, i: int) -> None:
    place = f"{beton.path}: sample {i} at byte {beton.offsets[i]}"
    data = beton.payload(i).tobytes()
    try:
        header = read_header(data, whole=True)
    except ImageError as error:
        raise BetonError(f"{place}: expected a JPEG stream, found: {error}") from error
    expected = (int(beton.heights[i]), int(beton.widths[i]))
    if (header.height, header.width) != expected:
        raise BetonError(
            f"{place}: expected {expected[0]} x {expected[1]} pixels, found "
            f"{header.height} x {header.width} in the JPEG header"
        )
    if beton.segments is None or not beton.segments.records["interval"][i]:
        return
    record = beton.segments.records[i]
    found = (header.coded, header.frame_at + 5, header.restart)
    if found != (record["head"], record["frame"], record["interval"]):
        raise BetonError(
            f"{segments_path(beton.path)}: sample {i}: expected head, frame and interval {found} "
            f"as in the JPEG header, found {(record['head'], record['frame'], record['interval'])}"
        )
    fault = find_fault(data, header.coded, beton.segments.of(i))
    if fault is not None:
        raise BetonError(f"{segments_path(beton.path)}: sample {i}: {fault}")


def _manifest(path: Path) -> Manifest | None:
    try:
        return load_manifest(manifest_path(path))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise BetonError(str(error)) from error


def _segments(path: Path, layout: Layout, manifest: Manifest | None) -> Segments | None:
    """Open the side file of a beton and check it against the beton; None if there is none."""
    side = segments_path(path)
    try:
        return open_segments(side, layout)
    except FileNotFoundError:
        if manifest is not None and manifest.restarts is not None:
            raise BetonError(
                f"{side}: expected the side file that the manifest mentions, found none"
            ) from None
        return None
    except OSError as error:
        raise BetonError(str(error)) from error


def _open(path: Path) -> Beton:
    """Map, lock and check a file, also against its manifest and side file if they exist."""
    manifest = _manifest(path)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise BetonError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        _lock(handle, path)
        data = _map(handle, path)
        layout = check_layout(path, data, manifest)
        if manifest is not None and manifest.fingerprint != layout.fingerprint:
            raise BetonError(
                f"{manifest_path(path)}: belongs to another file: expected fingerprint "
                f"{layout.fingerprint}, found {manifest.fingerprint!r}"
            )
        beton = Beton(
            **vars(layout),
            path=path,
            data=data,
            classes=manifest.classes if manifest is not None else (),
            manifest=manifest,
            segments=_segments(path, layout, manifest),
        )
    except BaseException:
        os.close(handle)
        raise
    beton._closer.append(weakref.finalize(beton, os.close, handle))
    return beton


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BetonError(f"{path}: another process is writing it") from error
    except OSError as error:  # Nothing is lost where the file system cannot lock.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise BetonError(f"{path}: cannot be locked: {error.strerror}") from error


def _map(handle: int, path: Path) -> Uint8:
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        raise BetonError(f"{path}: expected a regular file, found another kind")
    if status.st_size < HEADER.itemsize:
        raise BetonError(
            f"{path}: byte 0: expected a header of {HEADER.itemsize} bytes, "
            f"found a file of {status.st_size}"
        )
    # mmap duplicates its descriptor, and the duplicate would share our lock. So open another one.
    with open(path, "rb", buffering=0) as own:
        if not os.path.sameopenfile(handle, own.fileno()):
            raise BetonError(f"{path}: was replaced while being opened: try again")
        return np.frombuffer(mmap.mmap(own.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
