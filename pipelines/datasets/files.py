"""Files of a data set: read whole, where they are plain files below its folder."""

from __future__ import annotations

import os
import stat
from functools import lru_cache

MAX_FILE_BYTES = 1 << 29
"""Longer files are refused unread: no picture within the pixel limit needs half a gigabyte."""


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
