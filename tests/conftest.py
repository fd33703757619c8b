"""Shared fixtures; tests marked `gpu`, `ffcv` or `dali` are skipped where that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.conversion.convert import write_beton
from pipelines.datasets.index import SampleIndex
from tests.support.engines import MARKED, need
from tests.support.images import COUNT, save_jpeg, smooth_image


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Not while collecting: this imports the engines' packages.
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch.cuda.is_available() is False")
    for engine in MARKED:
        if item.get_closest_marker(engine):
            need(engine)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One torch thread, so that sums have the same order here and in other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 37 JPEG files in three classes: odd and even sizes, portrait, landscape, grey."""
    root = tmp_path_factory.mktemp("images") / "data"
    draw = np.random.default_rng(7)
    for i in range(COUNT):
        height, width = (int(v) for v in draw.integers(41, 120, 2))
        image = smooth_image(i, height, width)
        if i % 9 == 4:
            image = image.convert("L")
        save_jpeg(root / "abc"[i % 3] / f"{i:02}.jpg", image)
    return root


@pytest.fixture(scope="session")
def beton(folder: Path) -> Path:
    """The same images, in the same order, as a beton."""
    path = folder.parent / "data.beton"
    write_beton(SampleIndex.from_folder(folder), path, workers=1)
    return path
