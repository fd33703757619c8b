"""Files of a data set: read whole, where they are plain files below its folder."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any


class IndexFormatError(ValueError):
    """A folder or list file does not describe a data set; the message names the place."""


def _lines(source: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not empty, each with its place."""
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


def _json(source: Path) -> Any:
    if not source.is_file():
        raise FileNotFoundError(f"{str(source)!r} does not exist")
    try:
        return json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IndexFormatError(f"{source}: no JSON: {error}") from error


def _folder(path: str | os.PathLike[str]) -> Path:
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{str(path)!r} is not a folder")
    return Path(path)


MAX_FILE_BYTES = 1 << 29
"""Longer files are refused unread: no image within the pixel limit needs half a gigabyte."""


def read_file(path: str | os.PathLike[str], *, root: str | os.PathLike[str]) -> bytes:
    """Read a plain file below `root`, never waiting on a pipe and never following a link outside.

    Raises:
        OSError: With a message in words.
    """
    real = os.path.realpath(path)
    if not inside(real, _real_root(os.fspath(root))):
        raise PermissionError("the link leads outside the data folder")
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its writer for ever.
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
    """Whether a resolved path is a resolved folder or lies below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")
