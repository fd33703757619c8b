"""Compile every kernel once, so that no run need wait for it: python -m pipelines.warm."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.beton import Beton
from pipelines.convert import write_beton
from pipelines.index import SampleIndex
from pipelines.loader import missing_engines, open_loader
from pipelines.spec import LoaderSpec, RandomResizedCrop
from pipelines.splice import splice_batch


def compile_all() -> None:
    """Convert a picture and load it in all ways that lead to compiled code."""
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
        Image.fromarray(pixels).save(Path(folder) / "a.jpg", quality=90)
        data = Path(folder) / "a.beton"
        write_beton(SampleIndex.from_folder(folder), data, workers=1)
        with Beton.open(data) as beton:
            splice_batch(beton, np.zeros(1, np.int64), np.array([[8, 8, 16, 16]], np.int32))
        spec = LoaderSpec(
            data=str(data), engine="folder", batch_size=1, crop=RandomResizedCrop(8), workers=1
        )
        for precision in ("fp32", "bf16"):
            with open_loader(spec, precision=precision) as loader:
                next(loader.epoch(0))
        if "ffcv" not in missing_engines():
            spec = LoaderSpec(
                data=str(data), engine="ffcv", batch_size=1, crop=RandomResizedCrop(8), workers=1,
                resize="device",
            )  # fmt: skip
            with open_loader(spec) as loader:
                next(loader.epoch(0))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    compile_all()
