"""Writing .npy files row by row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.storage import replaced

Append = Callable[[npt.NDArray[np.generic]], None]
"""Appends rows: (n, dim), or (n,) for one-dimensional arrays."""


@contextlib.contextmanager
def npy_writer(folder: Path, name: str, dtype: str, dim: int | None = None) -> Iterator[Append]:
    """Write NAME.npy atomically, row by row; yield a function that appends rows.

    Not a memory map: on a full disk, writing to one ends the process (SIGBUS).

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
