"""`SampleIndex`: image files and their labels. No pixels are decoded.

Paths are packed into one block of bytes. Fourteen million samples take about 1 GB at 60 bytes per
path; a list of `Path` objects would take ten times as much.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipelines.arrays import Int64
from pipelines.datasets.files import IndexFormatError, read_file, require_folder
from pipelines.datasets.listing import (
    describe_extensions,
    is_image,
    leads_outside,
    line_number,
    parse_list,
    walk_classes,
    walk_images,
)
from pipelines.imaging.decode import ImageError, describe_error

FINGERPRINT_FILES = 1024
"""Number of files whose size `fingerprint` reads: few enough for a network file system."""

_SPLITS = frozenset(("train", "val", "valid", "validation", "test"))


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Image files below one folder, in order, with labels: a `pipelines.samples.Samples`."""

    root: Path
    """Folder that all paths are relative to."""
    blob: bytes
    """All relative paths, concatenated, in the file system's encoding."""
    offsets: Int64
    """int64 (N + 1,): path i is `blob[offsets[i]:offsets[i + 1]]`."""
    labels: Int64
    """int64 (N,): class ids; -1 where there are no labels."""
    classes: tuple[str, ...]
    """Class names by id; empty where there are no labels."""
    beton: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """Short hash of paths, labels, and sizes of up to `FINGERPRINT_FILES` evenly spaced files.

        So it detects that all files were replaced under the same names. It may miss a few replaced
        files among many, and misses a replacement of equal size. Modification times are not
        included: a copy on another machine has the same fingerprint.
        """
        digest = hashlib.sha256(self.blob)
        digest.update(self.labels.tobytes())
        count = min(len(self), FINGERPRINT_FILES)
        sizes = [self.size(k * len(self) // count) for k in range(count)]
        digest.update(np.array(sizes, "<i8").tobytes())
        return digest.hexdigest()[:16]

    def name(self, i: int) -> str:
        """Return the path of sample `i` relative to the root.

        Raises:
            IndexError: `i` is not in [0, N).
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} is not in 0..{len(self) - 1}")
        return os.fsdecode(self.blob[self.offsets[i] : self.offsets[i + 1]])

    def path(self, i: int) -> Path:
        """Return the path of sample `i`."""
        return self.root / self.name(i)

    def location(self, i: int) -> str:
        """Return the path of sample `i` as text."""
        return str(self.path(i))

    def read(self, i: int) -> bytes:
        """Read the file of sample `i`.

        Raises:
            ImageError: It cannot be read, is not a regular file, too long, or a link that leads
                outside the root.
        """
        try:
            return read_file(self.path(i), root=self.root)
        except OSError as error:
            raise ImageError(describe_error(error)) from error

    def size(self, i: int) -> int:
        """Return the file size of sample `i` in bytes; 0 if it cannot be read."""
        try:
            return self.path(i).stat().st_size
        except OSError:
            return 0  # `read` reports the error; this is only an estimate.

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def require_files(self, location_of: Callable[[int], str]) -> None:
        """Check that all files exist.

        Each folder is listed once. On a network file system, that is a thousand requests instead
        of a million, one per file.

        Args:
            location_of: Returns where sample i is named (file:line), for the message.

        Raises:
            FileNotFoundError: A file is missing. The message names the location of the first one.
        """
        folders: dict[bytes, array[int]] = {}
        bounds = self.offsets.tolist()
        for i in range(len(self)):
            folder = os.path.dirname(self.blob[bounds[i] : bounds[i + 1]])
            folders.setdefault(folder, array("q")).append(i)
        first = len(self)
        for folder, members in folders.items():
            try:
                present = frozenset(os.listdir(os.path.join(os.fsencode(self.root), folder)))
            except (FileNotFoundError, NotADirectoryError):
                present = frozenset()
            for i in members:
                name = os.path.basename(self.blob[bounds[i] : bounds[i + 1]])
                if i < first and name not in present:
                    first = i
        if first < len(self):
            raise FileNotFoundError(
                f"{location_of(first)}: {str(self.path(first))!r} does not exist"
            )

    def describe(self) -> dict[str, object]:
        """Describe the data set in JSON types, without absolute paths."""
        return {"kind": "files", "root": self.root.name, "samples": len(self)}

    @classmethod
    def from_folder(cls, root: str | os.PathLike[str], *, labelled: bool = True) -> SampleIndex:
        """Index a folder whose subfolders are classes, or any tree of images.

        Classes are the subfolders in sorted order, searched recursively. If there are images
        directly in `root`, or with `labelled=False`, all images below it are taken, without labels.
        Hidden files, hidden folders and files without an image's extension are skipped.

        Raises:
            FileNotFoundError: `root` is not a folder.
            IndexFormatError: There are no images, a class has no images, or a link leads outside.
        """
        base = require_folder(root)
        real = os.path.realpath(base)
        entries = [e for e in os.scandir(base) if not e.name.startswith(".")]
        folders = sorted(e.name for e in entries if e.is_dir())
        loose = any(is_image(e.name) and not e.is_dir() for e in entries)
        if not labelled or loose or not folders:
            blob, offsets = _pack(walk_images(base, "", real))
            if len(offsets) == 1:
                raise IndexFormatError(
                    f"no images in {str(base)!r} (extensions {describe_extensions()})"
                )
            return cls(base, blob, offsets, np.full(len(offsets) - 1, -1, np.int64), ())
        if _SPLITS.issuperset(folders):
            raise IndexFormatError(
                f"{str(base)!r} holds {', '.join(map(repr, folders))}: give one of these folders"
            )
        labels = array("q")
        blob, offsets = _pack(walk_classes(base, folders, real, labels))
        return cls(base, blob, offsets, np.frombuffer(labels, np.int64), tuple(folders))

    @classmethod
    def from_list(
        cls, file: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None
    ) -> SampleIndex:
        """Index a text file of `relative/path label` lines, such as ImageNet's meta/train.txt.

        The label follows the last space. If lines end with an image's extension, there are no
        labels. Class names are the ids as text. Empty lines are skipped.

        Args:
            file: The list, UTF-8.
            root: Folder that the paths are relative to. None: the folder of the list.

        Raises:
            FileNotFoundError: The list, the root or an image does not exist.
            IndexFormatError: A line is malformed. The message starts with file:line.
        """
        source = Path(file)
        if not source.is_file():
            raise FileNotFoundError(f"list file {str(source)!r} does not exist")
        base = require_folder(source.parent if root is None else root)
        labels = array("q")
        blob, offsets = _pack(parse_list(source, labels))
        ids = np.frombuffer(labels, np.int64)
        classes = tuple(map(str, range(int(ids.max()) + 1)))
        index = cls(base, blob, offsets, ids, classes)
        index.require_files(lambda i: f"{source}:{line_number(source, i)}")
        return index

    @classmethod
    def from_names(
        cls,
        root: str | os.PathLike[str],
        names: Iterable[str],
        labels: Sequence[int] | Int64,
        classes: Sequence[str],
    ) -> SampleIndex:
        """Index files with known paths and labels. Does not check that they exist.

        Args:
            root: Folder that the paths are relative to.
            names: N paths.
            labels: N class ids; -1: no label.
            classes: Class names by id.

        Raises:
            IndexFormatError: A path leads outside the root.
        """
        blob, offsets = _pack(_encode_names(names, root))
        return cls(Path(root), blob, offsets, np.array(labels, np.int64), tuple(classes))


def _pack(names: Iterable[bytes]) -> tuple[bytes, Int64]:
    """Concatenate names and return their offsets, without keeping a list of names."""
    blob, offsets = bytearray(), array("q", (0,))
    for name in names:
        blob += name
        offsets.append(len(blob))
    return bytes(blob), np.frombuffer(offsets, np.int64)


def _encode_names(names: Iterable[str], root: str | os.PathLike[str]) -> Iterator[bytes]:
    for name in names:
        if leads_outside(name):
            raise IndexFormatError(f"path {name!r} leads outside {os.fspath(root)!r}")
        yield os.fsencode(name)
