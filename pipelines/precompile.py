"""Compile all kernels in advance, so that no run waits for it: python -m pipelines.precompile."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines.batch import Regions
from pipelines.beton.reader import Beton
from pipelines.beton.splicing import splice_batch
from pipelines.conversion.convert import write_beton
from pipelines.datasets.index import SampleIndex
from pipelines.device.rotate import normalize_views
from pipelines.loader import open_loader
from pipelines.spec import IMAGENET, LoaderSpec, RandomResizedCrop


def compile_all() -> None:
    """Convert an image and load it in every way that runs compiled code."""
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
        Image.fromarray(pixels).save(Path(folder) / "a.jpg", quality=90)
        data = Path(folder) / "a.beton"
        write_beton(SampleIndex.from_folder(folder), data, workers=1)
        with Beton.open(data) as beton:
            splice_batch(beton, np.zeros(1, np.int64), np.array([[8, 8, 16, 16]], np.int32))
        # engine=auto: compiles the FFCV kernels if FFCV is installed.
        spec = LoaderSpec(data=str(data), batch_size=1, crop=RandomResizedCrop(8), workers=1)
        for precision in ("fp32", "bf16"):
            with open_loader(spec, precision=precision) as loader:
                next(loader.epoch(0))
    none, shape = torch.zeros(1, dtype=torch.int64), torch.full((1, 2), 16, dtype=torch.int32)
    regions = Regions(torch.zeros(768, dtype=torch.uint8), none, shape, none != 0, 8)
    normalize_views(regions, views=1, normalize=IMAGENET, dtype=torch.float32)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    compile_all()
