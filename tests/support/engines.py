"""Engines as test parameters, and comparing the batches that they serve."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from pipelines.batch import Batch
from pipelines.loader import Loader
from pipelines.spec import Normalize

PIXELS = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Leaves pixels unchanged, 0 to 255."""


MISSING = {
    engine: f"{module} is not installed"
    for engine, module in (("ffcv", "ffcv"), ("dali", "nvidia"))
    if importlib.util.find_spec(module) is None
}


def engines(*names: str) -> list[object]:
    """Test parameters "engine-data", skipped with the reason if the engine is missing."""
    return [
        pytest.param(
            name,
            marks=[pytest.mark.skip(reason=MISSING[engine])] if engine in MISSING else [],
        )
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
