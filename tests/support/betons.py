"""Small betons of noise, and what a conversion left in its folder."""

from __future__ import annotations

import importlib
import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines.beton.reader import Beton
from pipelines.conversion.convert import write_beton
from pipelines.datasets.images import MemoryImages
from tests.support.engines import need

COUNT = 24


def noise_pixels(i: int, height: int = 20, width: int = 30) -> npt.NDArray[np.uint8]:
    """uint8 (height + i, width, 3): noise, a function of i."""
    return np.random.default_rng(i).integers(0, 256, (height + i, width, 3), np.uint8)


def make_beton(path: Path, count: int = COUNT) -> Path:
    """Write `count` images of noise with five classes."""
    labels = np.arange(count, dtype=np.int64) % 5
    write_beton(MemoryImages(noise_pixels, labels, tuple("abcde")), path, workers=1)
    return path


def import_ffcv() -> Any:
    """Import ffcv or skip the test. The import sets torch to one thread; undo that."""
    need("ffcv")
    threads = torch.get_num_threads()
    try:
        return importlib.import_module("ffcv")
    finally:
        torch.set_num_threads(threads)


def stored_files(path: Path) -> list[bytes]:
    """The encoded images of a beton, in order."""
    with Beton.open(path) as beton:
        return [beton.payload(i).tobytes() for i in range(len(beton))]


def rejected(folder: Path, kind: str = "quarantine") -> dict[str, str]:
    """Reasons by path, from the list of rejected files beside out.beton."""
    lines = (folder / f"out.beton.{kind}.jsonl").read_text().splitlines()
    return {(line := json.loads(text))["path"]: line["reason"] for text in lines}


def assert_nothing_left(folder: Path, *, but: tuple[str, ...] = ()) -> None:
    """No output, no temporary or lock file, no child process."""
    left = {p.name for p in folder.iterdir() if p.name.lstrip(".").startswith("out.beton")}
    assert left == set(but)
    assert multiprocessing.active_children() == []
