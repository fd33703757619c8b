"""`njit` with an on-disk cache that is keyed on all sources of the package.

numba keys its cache of a function on that function's file alone. After a change in
`pipelines.jpeg.splice`, the kernels in `pipelines.engines.ffcv.kernels` would still contain the old
splicing. Therefore the cache folder is named by a hash of all modules of `pipelines`, because their
constants end up in the machine code, and of the versions of numba and llvmlite.

`python -m pipelines.precompile` compiles all functions ahead of the first run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite
import numba

log = logging.getLogger(__name__)

_F = TypeVar("_F", bound=Callable[..., Any])
_PACKAGE = Path(__file__).parents[1]
_PREFIX = "rotpred-"
_STALE_SECONDS = 30 * 24 * 3600.0


def digest(package: Path) -> str:
    """Hash the paths and contents of a package's source files and the versions of the compiler.

    Args:
        package: Folder of the package; sub-packages count.

    Returns:
        16 hexadecimal digits.
    """
    hasher = hashlib.sha256(f"numba {numba.__version__} llvmlite {llvmlite.__version__} ".encode())
    for path in sorted(package.rglob("*.py")):
        text = path.read_bytes()
        hasher.update(f"{path.relative_to(package)} {len(text)} ".encode() + text)
    return hasher.hexdigest()[:16]


def cache_folder(package: Path = _PACKAGE) -> Path | None:
    """Choose and create the folder that caches a package's machine code.

    It lies below NUMBA_CACHE_DIR if that is set, else in the package's `__pycache__`, else in the
    user's cache folder. Folders of other sources that have not been used for a month are removed.

    Args:
        package: Folder of the package.

    Returns:
        The folder; None if none of these places can be written.
    """
    given = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    roots = [Path(given)] if given else [package / "__pycache__", user / "rotpred"]
    name = _PREFIX + digest(package)
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
    log.warning(
        "compiled code cannot be kept in %s: every process compiles it again",
        " or ".join(map(str, roots)),
    )
    return None


def _remove_stale(root: Path) -> None:
    for folder in root.glob(_PREFIX + "*"):
        try:
            old = time.time() - folder.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:  # Another process has removed it.
            continue
        if old:
            shutil.rmtree(folder, ignore_errors=True)


_FOLDER = cache_folder()
_DECORATING = threading.Lock()  # Several threads may import modules.


def njit(function: _F) -> _F:
    """Compile a function on its first call: no GIL, cached on disk, numpy's error model."""
    config: Any = numba.config
    with _DECORATING:
        before = config.CACHE_DIR
        # numba reads it only while decorating, so functions of other packages are unaffected.
        config.CACHE_DIR = str(_FOLDER) if _FOLDER else before
        try:
            compiled: Any = numba.njit(cache=_FOLDER is not None, nogil=True, error_model="numpy")(
                function
            )
        finally:
            config.CACHE_DIR = before
    return cast(_F, compiled)
