"""Small data sets that several test files read, and the skip of GPU tests without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.conversion.convert import write_beton
from pipelines.datasets.index import SampleIndex

COUNT = 37
"""Images in the shared data set: prime, so that no batch size or world divides it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """So that sums come in one order, here and in other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def smooth_image(seed: int, height: int, width: int) -> Image.Image:
    """Random colors without fine detail, so that decoders and resampling filters agree on it."""
    coarse = np.random.default_rng(seed).integers(40, 216, (3, 3, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save_jpeg(path: Path, image: Image.Image, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", **{"quality": 95, "subsampling": 0, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 37 JPEG files together: odd and even sizes, portrait, landscape, grey."""
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
