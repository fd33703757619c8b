"""Writing .npy files row by row, in a folder that several jobs share."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rotpred.files import replaced

logger = logging.getLogger(__name__)

Append = Callable[[npt.NDArray[np.generic]], None]
"""Appends rows: (n, dim), or (n,) for one-dimensional arrays."""


@contextlib.contextmanager
def exclusive_writer(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold the write lock of a folder; create the folder if needed.

    The lock is `flock` on folder/.lock, which the kernel releases when the process ends for any
    reason. Temporary files of killed processes are removed. Reading needs no lock: files are
    renamed into place when complete.

    Args:
        folder: The folder to lock.
        wait: Whether to wait for another writer, without limit, after a log line.

    Raises:
        ValueError: Another process holds the lock and `wait` is False; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Unbuffered: on a full disk, closing the file must not try to write again.
    with (folder / ".lock").open("a+b", buffering=0) as file:
        if _locked(file.fileno(), folder, wait=wait):
            # Only with the lock: otherwise another job may be writing these files.
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def _locked(file: int, folder: Path, *, wait: bool) -> bool:
    """Lock the open file; return False if its file system does not support locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            logger.warning("cannot lock %s (%s); several jobs may compute the same", folder, error)
            return False
        holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
        if not wait:
            raise ValueError(
                f"{folder} is being written by {holder}, and a job of several processes does not "
                "wait: start it again when that one is done"
            ) from None
        logger.info("%s is being written by %s: waiting for it", folder, holder)
        fcntl.flock(file, fcntl.LOCK_EX)
    return True


@contextlib.contextmanager
def npy_writer(folder: Path, name: str, dtype: str, dim: int | None = None) -> Iterator[Append]:
    """Write NAME.npy atomically, row by row; yield a function that appends rows.

    Args:
        folder: Where the file is written.
        name: Name without suffix.
        dtype: Dtype of the array.
        dim: Length of a row: the array is (N, dim). None: it is (N,).
    """
    kind = np.dtype(dtype)
    count = 0
    with replaced(folder / f"{name}.npy") as temporary:
        with temporary.open("wb") as file:

            def header() -> None:
                shape = (count,) if dim is None else (count, dim)
                about = {"descr": kind.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, about)

            def append(part: npt.NDArray[np.generic]) -> None:
                nonlocal count
                file.write(np.ascontiguousarray(part, dtype=kind).tobytes())
                count += len(part)

            header()
            start = file.tell()
            yield append
            file.seek(0)
            header()  # numpy pads it, so that a longer shape fits
            assert file.tell() == start
