"""Which files, with which labels: no pixels.

Paths are packed into one block of bytes, so that fourteen million samples take about 1 GB at 60
bytes a path where a list of `Path` objects would take ten times that.
"""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.datasets.files import IndexFormatError, inside, read_file

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"))
"""File name endings taken for images, in any case."""

_SPLITS = frozenset(("train", "val", "valid", "validation", "test"))
_MAX_LABEL = 1_000_000


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Files below one folder, in a fixed order, with their labels."""

    root: Path
    """The folder that all paths are relative to."""
    blob: bytes
    """All relative paths, joined, in the file system's encoding."""
    offsets: npt.NDArray[np.int64]
    """(N + 1,): path i is `blob[offsets[i]:offsets[i + 1]]`."""
    labels: npt.NDArray[np.int64]
    """(N,): class ids; -1 where there are no labels."""
    classes: tuple[str, ...]
    """Class names by id; empty where there are no labels."""

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Path of sample `i` relative to the root."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} is not in 0..{len(self) - 1}")
        return os.fsdecode(self.blob[self.offsets[i] : self.offsets[i + 1]])

    def path(self, i: int) -> Path:
        """Path of sample `i`."""
        return self.root / self.name(i)

    def read(self, i: int) -> bytes:
        """Read the file of sample `i`.

        Raises:
            OSError: It is missing, no plain file, too long, or a link that leads outside the root.
        """
        return read_file(self.path(i), root=self.root)

    def size(self, i: int) -> int:
        """Length of the file of sample `i` in bytes; 0 where it cannot be told."""
        try:
            return self.path(i).stat().st_size
        except OSError:
            return 0  # `read` reports it; this is an estimate only.

    def subset(self, indices: npt.NDArray[np.int64]) -> SampleIndex:
        """The samples at `indices`, in that order; class ids stay as they are."""
        chosen = np.asarray(indices, dtype=np.int64)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"subset of {len(self)} samples asks for one outside of it")
        bounds = self.offsets
        blob, offsets = _pack(self.blob[bounds[i] : bounds[i + 1]] for i in chosen)
        return replace(self, blob=blob, offsets=offsets, labels=self.labels[chosen])

    def require_files(self, place: Callable[[int], str]) -> None:
        """Refuse an index that names a file that is not there.

        Each folder is listed once: on a network's file system that is a thousand requests where
        asking for the files one by one would be a million.

        Args:
            place: Where sample i is named, for the message.

        Raises:
            FileNotFoundError: The first one that is missing, after its place.
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
            raise FileNotFoundError(f"{place(first)}: {str(self.path(first))!r} does not exist")

    def describe(self) -> dict[str, object]:
        """What the data set is, without absolute paths."""
        return {"kind": "files", "root": self.root.name, "samples": len(self)}

    @classmethod
    def from_folder(cls, root: str | os.PathLike[str], *, labelled: bool = True) -> SampleIndex:
        """Index a folder whose subfolders are classes, or any tree of images.

        Classes are the subfolders in sorted order, searched recursively. Where images lie directly
        in `root`, or with `labelled=False`, every image below it is taken, without labels. Hidden
        files and folders are skipped, and so are files with other endings than `EXTENSIONS`.

        Raises:
            FileNotFoundError: `root` is not a folder.
            IndexFormatError: No image, a class without images, or a link that leads outside.
        """
        base = Path(root)
        if not base.is_dir():
            raise FileNotFoundError(f"{str(base)!r} is not a folder")
        real = os.path.realpath(base)
        entries = [e for e in os.scandir(base) if not e.name.startswith(".")]
        folders = sorted(e.name for e in entries if e.is_dir())
        loose = any(_is_image(e.name) and not e.is_dir() for e in entries)
        if not labelled or loose or not folders:
            blob, offsets = _pack(_walk(base, "", real))
            if len(offsets) == 1:
                raise IndexFormatError(f"no images in {str(base)!r} (endings {_endings()})")
            return cls(base, blob, offsets, np.full(len(offsets) - 1, -1, np.int64), ())
        if _SPLITS.issuperset(folders):
            raise IndexFormatError(
                f"{str(base)!r} holds {', '.join(map(repr, folders))}: give one of these folders"
            )
        labels = array("q")
        blob, offsets = _pack(_walk_classes(base, folders, real, labels))
        return cls(base, blob, offsets, np.frombuffer(labels, np.int64), tuple(folders))

    @classmethod
    def from_list(
        cls, file: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None
    ) -> SampleIndex:
        """Index a text file with one `relative/path label` a line, as in ImageNet's meta/train.txt.

        The label is what follows the last space; a file whose lines end in an image's ending has
        no labels. Class names are the ids as text. Empty lines are skipped.

        Args:
            file: The list, UTF-8.
            root: The folder that its paths are relative to; None takes the list's own folder.

        Raises:
            FileNotFoundError: The list, the root or an image does not exist.
            IndexFormatError: A line is wrong; the message starts with file:line.
        """
        source = Path(file)
        base = source.parent if root is None else Path(root)
        if not source.is_file():
            raise FileNotFoundError(f"list file {str(source)!r} does not exist")
        if not base.is_dir():
            raise FileNotFoundError(f"{str(base)!r} is not a folder")
        labels = array("q")
        blob, offsets = _pack(_parse_list(source, labels))
        if not labels:
            raise IndexFormatError(f"{str(source)!r} names no images")
        ids = np.frombuffer(labels, np.int64)
        classes = tuple(map(str, range(int(ids.max()) + 1)))
        index = cls(base, blob, offsets, ids, classes)
        index.require_files(lambda i: f"{source}:{_line_of(source, i)}")
        return index

    @classmethod
    def from_names(
        cls,
        root: str | os.PathLike[str],
        names: Iterable[str],
        labels: Sequence[int],
        classes: Sequence[str],
    ) -> SampleIndex:
        """Index files whose paths relative to `root` and class ids (-1: none) are known.

        Raises:
            IndexFormatError: A path leads outside the root.
        """
        blob, offsets = _pack(_checked(names, root))
        return cls(Path(root), blob, offsets, np.array(labels, np.int64), tuple(classes))


def _pack(names: Iterable[bytes]) -> tuple[bytes, npt.NDArray[np.int64]]:
    """Join names and note where each begins and ends, without holding them all apart."""
    blob, offsets = bytearray(), array("q", (0,))
    for name in names:
        blob += name
        offsets.append(len(blob))
    return bytes(blob), np.frombuffer(offsets, np.int64)


def _walk_classes(base: Path, folders: list[str], real: str, labels: array[int]) -> Iterator[bytes]:
    """Yield the files of one class after the other, noting their labels."""
    for label, folder in enumerate(folders):
        before = len(labels)
        for name in _walk(base, folder, real):
            labels.append(label)
            yield name
        if len(labels) == before:
            raise IndexFormatError(
                f"class {folder!r} has no images: nothing in {str(base / folder)!r} "
                f"ends in {_endings()}"
            )


def _walk(base: Path, folder: str, real: str) -> Iterator[bytes]:
    """Yield the images below one folder in torchvision's order: its own files first, sorted."""
    here = base / folder
    if here.is_symlink() and not inside(os.path.realpath(here), real):
        raise IndexFormatError(f"{str(here)!r} is a link that leads outside {str(base)!r}")
    files, folders = [], []
    with os.scandir(here) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # A folder named x.jpg is listed too: reading it fails, and the reason is reported.
            if _is_image(entry.name):
                files.append(entry.name)
            elif entry.is_dir():
                if entry.is_symlink() and inside(str(here.absolute()), os.path.realpath(entry)):
                    raise IndexFormatError(f"{entry.path!r} is a link to a folder above itself")
                folders.append(entry.name)
    for name in sorted(files):
        yield os.fsencode(os.path.join(folder, name))
    for name in sorted(folders):
        yield from _walk(base, os.path.join(folder, name), real)


def _parse_list(source: Path, labels: array[int]) -> Iterator[bytes]:
    """Yield the paths of a list file, noting their labels (-1 for none)."""
    labelled: bool | None = None
    with source.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            place = f"{source}:{number}"
            try:
                line = raw.decode().strip()
            except UnicodeDecodeError as error:
                raise IndexFormatError(f"{place}: not UTF-8 text") from error
            if not line:
                continue
            name, label = (line, -1) if _is_image(line) else _split(line, place)
            if labelled is None:
                labelled = label >= 0
            if labelled != (label >= 0):
                raise IndexFormatError(
                    f"{place}: {'has no' if labelled else 'has a'} label, unlike the lines before"
                )
            if _leads_outside(name):
                raise IndexFormatError(f"{place}: path {name!r} leads outside the root")
            labels.append(label)
            yield os.fsencode(name)


def _line_of(source: Path, i: int) -> int:
    """The number of the line that names sample i: empty ones name none."""
    with source.open("rb") as lines:
        named = (number for number, raw in enumerate(lines, 1) if raw.decode().strip())
        return next(itertools.islice(named, i, None))


def _checked(names: Iterable[str], root: str | os.PathLike[str]) -> Iterator[bytes]:
    for name in names:
        if _leads_outside(name):
            raise IndexFormatError(f"path {name!r} leads outside {os.fspath(root)!r}")
        yield os.fsencode(name)


def _leads_outside(name: str) -> bool:
    return os.path.isabs(name) or ".." in name.split("/") or "\0" in name


def _split(line: str, place: str) -> tuple[str, int]:
    """Cut `path label` at the last space."""
    name, _, text = line.rpartition(" ")
    if not name.strip() or not (text.isascii() and text.isdigit()):
        raise IndexFormatError(f"{place}: expected `relative/path label`, found {line[:200]!r}")
    if len(text) > 9 or int(text) >= _MAX_LABEL:
        raise IndexFormatError(f"{place}: label {text[:20]} is not below {_MAX_LABEL}")
    return name.strip(), int(text)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _endings() -> str:
    return " ".join(sorted(EXTENSIONS))
