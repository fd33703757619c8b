"""Arrays that are written row by row, in a folder that several jobs share."""

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


@contextlib.contextmanager
def alone(folder: Path, *, wait: bool) -> Iterator[None]:
    """Write into a folder alone; make it where missing.

    The lock is the kernel's (`flock` on folder/.lock) and ends with the process that holds it,
    however that ends. What killed processes left under temporary names is removed.

    Args:
        folder: may be read by anybody at any time: its files get their names when they are whole.
        wait: for another writer, without limit, after a line in the log.

    Raises:
        ValueError: another process writes, and `wait` is False; the message says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Unbuffered: on a full disk, closing the file must not try to write once more.
    with (folder / ".lock").open("a+b", buffering=0) as file:
        if _locked(file.fileno(), folder, wait=wait):
            # Only now: without the lock they may be another job's, which is writing them.
            for left in folder.glob(".*.tmp"):
                left.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def _locked(file: int, folder: Path, *, wait: bool) -> bool:
    """Whether the open file is locked now: not every network file system can."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            logger.warning("cannot lock %s (%s); jobs may do its work twice", folder, error)
            return False
        holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
        if not wait:
            raise ValueError(
                f"{folder} is being written by {holder}, for which a job of several processes does "
                "not wait: start it again when that one is done"
            ) from None
        logger.info("%s is being written by %s: waiting for it", folder, holder)
        fcntl.flock(file, fcntl.LOCK_EX)
    return True


@contextlib.contextmanager
def rows(folder: Path, name: str, dtype: str, dim: int | None = None) -> Iterator[Append]:
    """Write NAME.npy row by row: yields a function that appends (n, dim), or (n,) without dim."""
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
            header()  # numpy leaves room in it for a length that grows
            assert file.tell() == start
