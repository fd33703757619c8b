"""Files that are read back before they get their name, and loading that runs no code in a file."""

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
from typing import IO, Any

import torch


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or one that was found cannot be used; says why."""


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_space(folder: Path, size: int, *, what: str = "a checkpoint") -> None:
    """Raise `CheckpointError` where a file of `size` bytes, and its overhead, would not fit."""
    needed = size + size // 50 + 2**20  # names, alignment and the archive's index
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"no space for {what} in {folder}: needs {needed / 1e6:,.0f} MB, "
            f"{free / 1e6:,.0f} MB are free"
        )


class _HashingFile(io.FileIO):
    """A file that knows the digest of what it was told to write, whatever reaches the disk."""

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
    """Return the name that a file of this process has until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_verified(path: Path, fill: Callable[[IO[bytes]], object]) -> tuple[Path, str]:
    """Write a temporary file beside `path`, force it to the disk, and read it back.

    Returns:
        The temporary file, for `replace`, and its SHA-256.

    Raises:
        CheckpointError: it cannot be written, or reads back otherwise. Nothing is left then.
    """
    temporary = temporary_of(path)
    try:
        with _HashingFile(temporary) as file:
            fill(file)
            os.fsync(file.fileno())
        digest = file.digest.hexdigest()
        if sha256_file(temporary) != digest:
            raise CheckpointError(f"{temporary} reads back other bytes than were written")
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary, digest


def replace(temporary: Path, path: Path) -> None:
    """Give a finished file its name, and make the name last."""
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut, too
    finally:
        os.close(folder)


def load_plain(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    """Read a dict of tensors and plain types, running no code that the file may hold.

    Raises:
        CheckpointError: damaged, or anything else than such a dict.
    """
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    # Damaged files raise whatever their bytes lead to; all of it means the same here.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors and plain types: {reason}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict")
    return content


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write; on leaving, fsync it and rename it to `path`.

    Where the body raises, the temporary file is removed and `path` is what it was.
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
    """Write a whole file or nothing."""
    with replaced(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: object) -> None:
    """Write indented JSON, whole or not at all. NaN and infinity are refused (`ValueError`)."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def plain(value: object) -> object:
    """What JSON can hold of a recipe: nested dataclasses become objects with their `type`."""
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
