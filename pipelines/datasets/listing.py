"""Paths and labels of image files, from class folders or list files."""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

from pipelines.datasets.files import IndexFormatError, inside, read_lines

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"))
"""Extensions of image files, in lower case. Files in any case are accepted."""

_MAX_LABEL = 1_000_000  # exclusive


def walk_classes(base: Path, folders: list[str], real: str, labels: array[int]) -> Iterator[bytes]:
    """Yield the images of class folders, one class after the other.

    Args:
        base: Root of the data set.
        folders: Class folders, relative to the root.
        real: The resolved root.
        labels: The class id of each image is appended to it.

    Yields:
        Paths relative to the root, in the file system's encoding.

    Raises:
        IndexFormatError: A class has no images, or see `walk_images`.
    """
    for label, folder in enumerate(folders):
        before = len(labels)
        for name in walk_images(base, folder, real):
            labels.append(label)
            yield name
        if len(labels) == before:
            raise IndexFormatError(
                f"class {folder!r} has no images: nothing in {str(base / folder)!r} "
                f"ends in {describe_extensions()}"
            )


def walk_images(base: Path, folder: str, real: str) -> Iterator[bytes]:
    """Yield the images below a folder in torchvision's order: sorted, files before subfolders.

    Hidden files and folders are skipped.

    Args:
        base: Root of the data set.
        folder: The folder, relative to the root.
        real: The resolved root.

    Yields:
        Paths relative to the root, in the file system's encoding.

    Raises:
        IndexFormatError: A folder is a link to one outside the root or above itself.
    """
    here = base / folder
    if here.is_symlink() and not inside(os.path.realpath(here), real):
        raise IndexFormatError(f"{str(here)!r} is a link that leads outside {str(base)!r}")
    files, folders = [], []
    with os.scandir(here) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # A folder named x.jpg is listed too. Reading it fails and reports why.
            if is_image(entry.name):
                files.append(entry.name)
            elif entry.is_dir():
                if entry.is_symlink() and inside(str(here.absolute()), os.path.realpath(entry)):
                    raise IndexFormatError(f"{entry.path!r} is a link to a folder above itself")
                folders.append(entry.name)
    for name in sorted(files):
        yield os.fsencode(os.path.join(folder, name))
    for name in sorted(folders):
        yield from walk_images(base, os.path.join(folder, name), real)


def parse_list(source: Path, labels: array[int]) -> Iterator[bytes]:
    """Yield the paths in a list file of `relative/path label` or `relative/path` lines.

    Args:
        source: The list, UTF-8.
        labels: The label of each path is appended to it; -1 if the list has no labels.

    Yields:
        Paths in the file system's encoding.

    Raises:
        FileNotFoundError: There is no such file.
        IndexFormatError: A line is malformed, or there are none. The message names the line.
    """
    labelled: bool | None = None
    for location, line in read_lines(source):
        name, label = (line, -1) if is_image(line) else _split_label(line, location)
        if labelled is None:
            labelled = label >= 0
        if labelled != (label >= 0):
            raise IndexFormatError(
                f"{location}: {'has no' if labelled else 'has a'} label, unlike the lines before"
            )
        if leads_outside(name):
            raise IndexFormatError(f"{location}: path {name!r} leads outside the root")
        labels.append(label)
        yield os.fsencode(name)


def line_number(source: Path, i: int) -> int:
    """Return the line number of sample i in a list file, which may have empty lines."""
    with source.open("rb") as lines:
        named = (number for number, raw in enumerate(lines, 1) if raw.decode().strip())
        return next(itertools.islice(named, i, None))


def leads_outside(name: str) -> bool:
    """Return whether a path is absolute, contains `..` or a null character."""
    return os.path.isabs(name) or ".." in name.split("/") or "\0" in name


def _split_label(line: str, location: str) -> tuple[str, int]:
    """Split `path label` at the last space."""
    name, _, text = line.rpartition(" ")
    if not name.strip() or not (text.isascii() and text.isdigit()):
        raise IndexFormatError(f"{location}: expected `relative/path label`, found {line[:200]!r}")
    if len(text) > 9 or int(text) >= _MAX_LABEL:
        raise IndexFormatError(f"{location}: label {text[:20]} is not below {_MAX_LABEL}")
    return name.strip(), int(text)


def is_image(name: str) -> bool:
    """Return whether a file name has the extension of an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def describe_extensions() -> str:
    """Return all extensions of images, for messages."""
    return " ".join(sorted(EXTENSIONS))
