"""Files of a data set: text, JSON, and images below its root (links that lead out are refused)."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any


class IndexFormatError(ValueError):
    """A folder or file does not have the expected layout. The message names file and line."""


def read_lines(source: Path) -> Iterator[tuple[str, str]]:
    """Yield the non-empty lines of a UTF-8 text file.

    Yields:
        `file:line` for error messages, and the line without surrounding spaces.

    Raises:
        FileNotFoundError: There is no such file.
        IndexFormatError: The file is not UTF-8 or has no lines.
    """
    if not source.is_file():
        raise FileNotFoundError(f"{str(source)!r} does not exist")
    empty = True
    with source.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = raw.decode().strip()
            except UnicodeDecodeError as error:
                raise IndexFormatError(f"{source}:{number}: not UTF-8 text") from error
            if line:
                empty = False
                yield f"{source}:{number}", line
    if empty:
        raise IndexFormatError(f"{source}: is empty")


def read_json(source: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        IndexFormatError: The file is not valid JSON.
    """
    if not source.is_file():
        raise FileNotFoundError(f"{str(source)!r} does not exist")
    try:
        # Text, not bytes: json.loads would hold both, 450 MB each for COCO's train2017.
        return json.loads(source.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise IndexFormatError(f"{source}: not valid JSON: {error}") from error


def require_folder(path: str | os.PathLike[str]) -> Path:
    """Return the path of an existing folder.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{str(path)!r} is not a folder")
    return Path(path)


MAX_FILE_BYTES = 1 << 29
"""Largest file that is read. No image within the pixel limit needs half a gigabyte."""


def read_file(path: str | os.PathLike[str], *, root: str | os.PathLike[str]) -> bytes:
    """Read a regular file below `root`.

    Raises:
        OSError: The file is missing, is not a regular file, has more than `MAX_FILE_BYTES` bytes,
            or is a link to a file outside `root`. The message is one readable line.
    """
    real = os.path.realpath(path)
    if not inside(real, _real_root(os.fspath(root))):
        raise PermissionError("the link leads outside the data folder")
    try:
        # Without O_NONBLOCK, opening a named pipe would block until it has a writer.
        handle = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        what = "a link to a file" if os.path.islink(path) else "a file"
        raise FileNotFoundError(f"{what} that does not exist") from error
    try:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError("a folder, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise OSError("a pipe, socket or device, not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise OSError(f"longer than {MAX_FILE_BYTES} bytes")
        with open(handle, "rb", buffering=0, closefd=False) as stream:
            return stream.readall()
    finally:
        os.close(handle)


@lru_cache(maxsize=64)
def _real_root(root: str) -> str:
    return os.path.realpath(root)


def inside(path: str, folder: str) -> bool:
    """Return whether `path` is `folder` or lies below it. Both must be resolved."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")
