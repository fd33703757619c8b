"""Atomic file writes, checksums, and loading of tensors without unpickling code."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class CheckpointError(ValueError):
    """A checkpoint cannot be written or cannot be used. The message says why."""


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_space(folder: Path, size: int, *, what: str = "a checkpoint") -> None:
    """Check that the disk has room for a file of `size` bytes and its overhead.

    Raises:
        CheckpointError: The file would not fit.
    """
    needed = size + size // 50 + 2**20  # names, alignment and the archive's index
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"no space for {what} in {folder}: needs {needed / 1e6:,.0f} MB, "
            f"{free / 1e6:,.0f} MB are free"
        )


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


def temporary_of(path: Path) -> Path:
    """Return the name that this process gives `path` until the file is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_verified(path: Path, fill: Callable[[IO[bytes]], object]) -> tuple[Path, str]:
    """Write a temporary file beside `path`, fsync it, read it back and compare the digests.

    Returns:
        The temporary file, for `replace`, and its SHA-256.

    Raises:
        CheckpointError: The file cannot be written, or its bytes differ when read back. The
            temporary file is removed.
    """
    temporary = temporary_of(path)
    try:
        with _HashingFile(temporary) as file:
            fill(file)
            os.fsync(file.fileno())
        digest = file.digest.hexdigest()
        if sha256_file(temporary) != digest:
            raise CheckpointError(f"{temporary} differs from what was written to it")
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary, digest


def replace(temporary: Path, path: Path) -> None:
    """Rename a finished file to `path` and fsync its folder."""
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def load_plain(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    """Read a dict of tensors and plain types without running code from the file.

    Raises:
        CheckpointError: The file is damaged or holds anything else.
    """
    import torch

    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    # Damaged bytes may raise any exception; all of them mean a damaged file.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors and plain types: {reason}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict")
    return content


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on exit, fsync it and rename it to `path`.

    If the body raises, the temporary file is removed and `path` stays unchanged.
    """
    temporary = temporary_of(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically: completely or not at all."""
    with replaced(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: object) -> None:
    """Write indented JSON atomically.

    Raises:
        ValueError: The value holds NaN or infinity.
    """
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def plain(value: object) -> object:
    """Convert a recipe to JSON values; a dataclass becomes an object with its class as `type`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
