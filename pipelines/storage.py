"""Files that are complete or absent: atomic writes, checksums, JSON, and locks between processes.

Everything that is kept on disk goes through here: betons, run folders, checkpoints, feature arrays,
weights and pages. A file is written under a temporary name beside its place, `.NAME.PID.tmp`, and
renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class LockedError(ValueError):
    """Another process holds the lock. The message names it."""


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_space(folder: Path, size: int, *, what: str) -> None:
    """Check that the disk has room for a file of `size` bytes and its overhead.

    Raises:
        ValueError: The file would not fit.
    """
    needed = size + size // 50 + 2**20  # names, alignment and the archive's index
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"no space for {what} in {folder}: needs {needed / 1e6:,.0f} MB, "
            f"{free / 1e6:,.0f} MB are free"
        )


def temporary_of(path: Path) -> Path:
    """Return the name that this process gives `path` until it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove what killed processes left of `name`, or of any file. The caller holds the lock.

    For a name, this includes what versions before 0.3 left: NAME.tmp.PID and its side file.
    """
    known = re.escape(name)
    old = rf"|{known}\.tmp\.\d+(\.segments)?" if name else ""
    pattern = re.compile(rf"\.{known or '.+'}\.\d+\.tmp{old}")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Sync a file to the disk, or a folder, so that renames in it survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replaced(path: Path, *, size: int = 0) -> Iterator[Path]:
    """Yield a temporary path to write to; on exit, sync it to the disk and rename it to `path`.

    If the body raises, the temporary file is removed and `path` stays unchanged.

    Args:
        path: The file to replace.
        size: Bytes that will be written, if the disk should be checked for them.

    Raises:
        ValueError: They would not fit.
    """
    if size:
        check_space(path.parent, size, what=path.name)
    temporary = temporary_of(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_together(target: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary path; on exit, rename each file PATH + suffix to `target` + suffix.

    The body writes and syncs them. They are renamed one by one, in the order of `suffixes`, after
    all are complete; a file that was not written is removed from beside `target`. If the body
    raises, its files are removed, and `target` stays unchanged.
    """
    folder = temporary_of(target)
    folder.mkdir()
    try:
        yield folder / target.name
        for suffix in suffixes:
            staged, place = folder / f"{target.name}{suffix}", Path(f"{target}{suffix}")
            if staged.exists():
                os.replace(staged, place)
            else:
                place.unlink(missing_ok=True)
        _sync(target.parent)
    finally:
        # On NFS a file that is still mapped keeps its folder: the next holder of the lock sweeps.
        shutil.rmtree(folder, ignore_errors=True)


class _HashingFile(io.FileIO):
    """A file that hashes the bytes passed to `write`, whether or not they reach the disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.digest = hashlib.sha256()

    def write(self, data: Any, /) -> int:  # raw files may write less than asked
        view = memoryview(data).cast("B")
        self.digest.update(view)
        done = 0
        while done < len(view):
            done += super().write(view[done:])
        return done


def write_verified(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> str:
    """Write a file, sync it to the disk, read it back and compare the digests.

    Args:
        path: A temporary path, as from `replaced`.
        content: The bytes, or a function that writes them to the open file.

    Returns:
        The file's SHA-256.

    Raises:
        OSError: The file cannot be written, or its bytes differ when read back.
    """
    with _HashingFile(path) as file:
        file.write(content) if isinstance(content, bytes) else content(file)
        os.fsync(file.fileno())
    digest = file.digest.hexdigest()
    if sha256_file(path) != digest:
        raise OSError(errno.EIO, "the file differs from what was written to it", str(path))
    return digest


def write_atomic(path: Path, data: bytes) -> str:
    """Write a file atomically, after reading it back; return its SHA-256.

    Raises:
        OSError: The file cannot be written, or its bytes differ when read back.
    """
    with replaced(path) as temporary:
        return write_verified(temporary, data)


def write_json(path: Path, value: object, *, indent: int | None = 2) -> None:
    """Write JSON atomically, on one line if `indent` is None.

    Raises:
        OSError: As for `write_atomic`.
        ValueError: The value holds NaN or infinity.
    """
    write_atomic(path, (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode())


def read_json(path: Path, kind: type[T]) -> T:
    """Read a JSON file whose outermost value is a `kind`: dict or list.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not JSON, or holds something else. The message names it.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); move or repair it") from error
    if not isinstance(value, kind):
        raise ValueError(
            f"{path} is not usable: expected a {kind.__name__} in JSON, found a "
            f"{type(value).__name__}; move or repair it"
        )
    return value


@contextlib.contextmanager
def locked(target: Path, *, hint: str, wait: bool = False) -> Iterator[None]:
    """Hold the write lock of a folder or file, and remove temporary files of writers that died.

    An existing folder is locked by FOLDER/.lock, which stays; any other path by PATH.lock, which is
    removed at the end. Lock files name their holder. Reading needs no lock: files are renamed into
    place when complete. The kernel releases the lock when the process ends for any reason.

    Args:
        target: What to lock.
        hint: Ends the message "TARGET is in use by HOLDER: ".
        wait: Whether to wait for another holder, without limit, after a log line.

    Raises:
        LockedError: Another process holds the lock and `wait` is False.
        OSError: The file system cannot lock. For a folder this is a warning only.
    """
    is_folder = target.is_dir()
    path = target / ".lock" if is_folder else Path(f"{target}.lock")
    with contextlib.ExitStack() as files:
        while True:
            # Unbuffered: on a full disk, closing the file must not write again.
            file = files.enter_context(path.open("a+b", buffering=0))
            error = None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as refusal:
                if refusal.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    holder = os.pread(file.fileno(), 200, 0).decode(errors="replace").strip()
                    message = f"{target} is in use by {holder or 'another process'}"
                    if not wait:
                        raise LockedError(f"{message}: {hint}") from None
                    logger.info("%s: waiting for it", message)
                    fcntl.flock(file, fcntl.LOCK_EX)
                else:
                    error = refusal
            if is_folder:
                break
            if error is not None:
                raise error
            # The previous holder may have removed the file between our opening and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    break
        try:
            if error is None:
                remove_leftovers(path.parent, "" if is_folder else target.name)
            else:  # Some network file systems cannot lock.
                logger.warning("cannot lock %s (%s): no other job may use it", target, error)
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            except OSError as full:
                logger.warning("cannot write %s (%s)", path, full)
            yield
        finally:
            if not is_folder:
                path.unlink(missing_ok=True)
