"""Atomic, durable file writes and exclusive locks on output files."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
from collections.abc import Iterator
from pathlib import Path


def stage_text(path: Path, text: str) -> Path:
    """Write a small file under a temporary name beside `path`, and sync it to the disk.

    Returns:
        The temporary file. Renaming it to `path` completes the write.
    """
    temporary = Path(f"{path}.tmp.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    return temporary


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically, and sync it to the disk."""
    temporary = stage_text(path, text)
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync a folder to the disk, so that renames in it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def exclusive_lock(output: Path) -> Iterator[None]:
    """Lock `output` for writing, and delete temporary files of writers that have died.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    path = Path(f"{output}.lock")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the file between our open and our lock.
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                break
        except BlockingIOError:
            os.close(handle)
            raise BlockingIOError(f"another process is writing {output}") from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        for kind in ("", ".json", ".quarantine.jsonl", ".failed.jsonl"):
            for stale in glob.glob(f"{glob.escape(str(output))}{kind}.tmp.*"):
                # The side file of the temporary file is NAME.tmp.PID.segments.
                if stale.removesuffix(".segments").rpartition(".")[2].isdigit():
                    os.unlink(stale)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
