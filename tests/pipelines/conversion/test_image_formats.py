"""Unusual image formats: all engines decode the same pixels, from files and from a beton."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.conversion.convert import write_beton
from pipelines.datasets.index import SampleIndex
from pipelines.loader import open_loader
from pipelines.spec import LoaderSpec, Normalize, Resize
from tests.support.engines import REAL
from tests.support.images import smooth_image

pytestmark = pytest.mark.timeout(120)

NAMES = ("cmyk", "grey", "palette", "rgba", "sixteen", "webp")
"""In index order. palette is a PNG, sixteen a 16-bit grey PNG, webp has the suffix .jpg."""

TOLERANCE = 8.0
"""Largest mean absolute difference from Pillow, in levels: filters and CMYK conversions differ."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """The folder, and the pixels of each file as Pillow decodes them: uint8 (6, 32, 32, 3)."""
    root = tmp_path_factory.mktemp("formats") / "data"
    (root / "a").mkdir(parents=True)
    base = smooth_image(3, 64, 64)
    base.convert("CMYK").save(root / "a/0_cmyk.jpg", quality=95)
    base.convert("L").save(root / "a/1_grey.jpg", quality=95)
    base.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(root / "a/2_palette.png")
    base.convert("RGBA").save(root / "a/3_rgba.png")
    grey = np.asarray(base.convert("L"), np.uint16) * 257
    Image.fromarray(grey).save(root / "a/4_sixteen.png")
    base.save(root / "a/5_webp.jpg", "WEBP", quality=95)
    color = np.asarray(base.resize((32, 32), Image.Resampling.BOX))
    light = np.asarray(base.convert("L").convert("RGB").resize((32, 32), Image.Resampling.BOX))
    expected = [light if name in ("grey", "sixteen") else color for name in NAMES]
    return root, torch.from_numpy(np.stack(expected))


@pytest.fixture(scope="module")
def converted(images: tuple[Path, torch.Tensor]) -> Path:
    """The same images as a beton."""
    made = images[0].parent / "data.beton"
    manifest = write_beton(SampleIndex.from_folder(images[0]), made, workers=1)
    assert (manifest.passed, manifest.quarantined) == (1, 0)  # the grey JPEG is stored unchanged
    return made


@pytest.mark.parametrize("engine_and_data", REAL)
def test_odd_images_look_alike(
    images: tuple[Path, torch.Tensor], converted: Path, engine_and_data: str
) -> None:
    engine, kind = engine_and_data.split("-")
    data, expected = {"folder": images[0], "beton": converted}[kind], images[1]
    spec = LoaderSpec(data=str(data), batch_size=6, crop=Resize(32), flip=False, shuffle=False)
    plain = replace(
        spec, engine=engine, views="plain", drop_last=False, normalize=Normalize((0,) * 3, (1,) * 3)
    )  # type: ignore[arg-type]
    with open_loader(plain) as loader:
        batch = next(loader.epoch(0))
    found = batch.images.permute(0, 2, 3, 1)
    assert batch.valid.all() and batch.labels.tolist() == [0] * 6
    for name, image, reference in zip(NAMES, found, expected, strict=True):
        difference = (image - reference).abs().mean().item()
        assert difference < TOLERANCE, (name, difference)
