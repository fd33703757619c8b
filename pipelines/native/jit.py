"""Compilation with numba whose machine code on disk follows every source that it was made of.

numba keys what it keeps of a function on the file of that function alone: after a change of
`splice.py` it would go on with the old splicing inside the kernels of `kernels.py`. So the folder
it is kept in is named by a hash of all modules here, whose constants are part of the machine code
wherever they are, and of the compiler's versions.

`python -m pipelines.precompile` compiles them all, so that a first run need not.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite
import numba

log = logging.getLogger(__name__)

_F = TypeVar("_F", bound=Callable[..., Any])
_PACKAGE = Path(__file__).parents[1]
_PREFIX = "rotpred-"
_STALE_SECONDS = 30 * 24 * 3600.0


def digest(sources: Iterable[Path]) -> str:
    """16 hexadecimal digits that change with any byte or name of these files, or the compiler.

    Args:
        sources: Python files.
    """
    found = hashlib.sha256(f"numba {numba.__version__} llvmlite {llvmlite.__version__} ".encode())
    for path in sorted(sources):
        text = path.read_bytes()
        found.update(f"{path.name} {len(text)} ".encode() + text)
    return found.hexdigest()[:16]


def cache_folder(package: Path = _PACKAGE) -> Path | None:
    """Where the machine code of a package's sources is kept; None where nothing can be written.

    Below NUMBA_CACHE_DIR where that is set, else beside the package's own compiled files, else in
    the user's cache folder. Folders of other sources that nobody has used for a month are removed.
    """
    given = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    roots = [Path(given)] if given else [package / "__pycache__", user / "rotpred"]
    name = _PREFIX + digest(package.rglob("*.py"))
    for root in roots:
        folder = root / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            os.utime(folder)
        except OSError:
            continue
        _remove_stale(root)
        return folder
    log.warning("compiled code cannot be kept in %s: compiling anew", " or ".join(map(str, roots)))
    return None


def _remove_stale(root: Path) -> None:
    for folder in root.glob(_PREFIX + "*"):
        try:
            old = time.time() - folder.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:  # Another process was faster.
            continue
        if old:
            shutil.rmtree(folder, ignore_errors=True)


_FOLDER = cache_folder()
_DECORATING = threading.Lock()  # Modules may be imported by several threads.


def njit(function: _F) -> _F:
    """Compile a function when first called: without the GIL, kept on disk, numpy's arithmetic."""
    config: Any = numba.config
    with _DECORATING:
        before = config.CACHE_DIR
        # Read while decorating only; other packages' functions stay where they were.
        config.CACHE_DIR = str(_FOLDER) if _FOLDER else before
        try:
            compiled: Any = numba.njit(cache=_FOLDER is not None, nogil=True, error_model="numpy")(
                function
            )
        finally:
            config.CACHE_DIR = before
    return cast(_F, compiled)
