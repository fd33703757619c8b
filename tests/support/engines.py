"""Engines as test parameters, which of them are missing, and comparing the batches they serve."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch

from pipelines.batch import Batch
from pipelines.engines.choice import ENGINES, missing_reason
from pipelines.loader import Loader
from pipelines.spec import Normalize

PIXELS = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Leaves pixels unchanged, 0 to 255."""


MARKED = ("ffcv", "dali")
"""Engines that an installation may lack. Each is also the marker of the tests that need it."""


@functools.cache
def missing(engine: str) -> str | None:
    """Return why the package of an engine cannot be imported, in one line, or None if it can."""
    reason = missing_reason(engine)
    if reason is None:
        return None
    # If only our own module is broken, its tests must run and fail. Another process, because a
    # module that failed halfway may stay in this one.
    code = f"import {ENGINES[engine][1]}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    return reason if done.returncode else None


def need(engine: str) -> None:
    """Skip the test, or the module that is being imported, if an engine's package is missing."""
    if (reason := missing(engine)) is not None:
        pytest.skip(reason, allow_module_level=True)


def engine_module(engine: str, name: str) -> Any:
    """Import a module of `pipelines.engines`, or skip as `need` does."""
    need(engine)
    return importlib.import_module(f"pipelines.engines.{engine}.{name}")


def engines(*names: str) -> list[object]:
    """Test parameters "engine-data", each with the marker of its engine."""
    return [
        pytest.param(name, marks=[getattr(pytest.mark, e) for e in MARKED if e == engine])
        for name in names
        for engine in [name.split("-")[0]]
    ]


REAL = engines("folder-folder", "folder-beton", "ffcv-beton", "dali-folder", "dali-beton")


ALL = [*REAL, "synthetic-none"]


OTHERS = engines("folder-beton", "ffcv-beton", "dali-folder", "dali-beton")


def epoch_of(loader: Loader, epoch: int = 0, start: int = 0) -> list[Batch]:
    """All batches of an epoch, from step `start`."""
    return list(loader.epoch(epoch, start_step=start))


def served(batches: list[Batch]) -> list[int]:
    """Indices of the valid samples, in the order served."""
    return [int(i) for b in batches for i in b.indices[b.valid[: len(b.indices)]]]


def equal(a: list[Batch], b: list[Batch]) -> bool:
    """Whether all tensors of all batches are equal."""
    return len(a) == len(b) and all(
        torch.equal(x, y)
        for one, two in zip(a, b, strict=True)
        for x, y in zip(one, two, strict=True)
    )
