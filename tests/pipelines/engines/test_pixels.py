"""Pixels: all engines cut the same crops of the same upright images."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pipelines.beton.reader import Beton
from pipelines.conversion.convert import write_beton
from pipelines.datasets.index import SampleIndex
from pipelines.sampling.crops import crop_boxes
from pipelines.spec import (
    CenterCrop,
    Crop,
    RandomCrop,
    RandomResizedCrop,
    Resize,
)
from tests.support.engines import OTHERS, REAL, engines, epoch_of, equal
from tests.support.images import save_jpeg, smooth_image

pytestmark = pytest.mark.timeout(120)


MEASURED = {"folder": (0.0, 0), "dali": (0.4, 1), "ffcv": (2.0, 8)}
"""Largest allowed difference from the folder engine, in levels of 256: mean of an image, and any
pixel.

Measured on these images: DALI 0.26 and 1, the same decoder and filter with other rounding. FFCV
1.3 and 5: it decodes with the fast DCT."""


CROPS: dict[str, Crop] = {
    "random-resized": RandomResizedCrop(24),
    "random-padded": RandomCrop(24, padding=4),
    "random-resized-padded": RandomCrop(24, padding=6, resize=28),
    "random-resized-first": RandomCrop(24, padding=0, resize=30),
    "center-resized": CenterCrop(24, resize=28),
    "center-as-is": CenterCrop(24, resize=None),
    "center-larger-than-the-image": CenterCrop(90, resize=None),
    "center-larger-than-resized": CenterCrop(40, resize=32),
    "squash": Resize(24),
}


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
@pytest.mark.parametrize("name", OTHERS)
def test_engines_agree(open_engine, name: str, crop: Crop) -> None:
    reference = open_engine("folder-folder", crop=crop)
    loader = open_engine(name, crop=crop)
    for epoch in (0, 1):
        for ours, theirs in zip(epoch_of(reference, epoch), epoch_of(loader, epoch), strict=True):
            assert torch.equal(ours.indices, theirs.indices)
            assert torch.equal(ours.labels, theirs.labels)
            assert torch.equal(ours.valid, theirs.valid)
            far = (ours.images - theirs.images).abs()
            mean, most = MEASURED[name.split("-")[0]]
            assert far.mean((1, 2, 3)).max() <= mean and far.max() <= most
        assert loader.digest == reference.digest != 0
    assert loader.classes == reference.classes == ("a", "b", "c")


@pytest.mark.parametrize("name", REAL)
def test_the_number_of_workers_changes_no_pixel(open_engine, name: str) -> None:
    one = open_engine(name, workers=1, batch_size=18)
    many = open_engine(name, workers=2, batch_size=18)
    more_than_cores = open_engine(name, workers=5, batch_size=18)
    expected = epoch_of(one)
    assert equal(expected, epoch_of(many)) and equal(expected, epoch_of(more_than_cores))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of 32x32 as a beton, like CIFAR-10."""
    root = tmp_path_factory.mktemp("squares")
    for i in range(12):
        save_jpeg(root / "data" / "x" / f"{i:02}.jpg", smooth_image(100 + i, 32, 32))
    write_beton(SampleIndex.from_folder(root / "data"), root / "s.beton", workers=1)
    return root / "s.beton"


@pytest.mark.parametrize("name", engines("folder", "ffcv", "dali"))
def test_padded_crop_is_pillows(open_engine, squares: Path, name: str) -> None:
    """The black border lies where Pillow puts it, and the pixels inside are those of the image."""
    crop = RandomCrop(32, padding=4)
    loader = open_engine(f"{name}-{squares}", crop=crop)
    with Beton.open(squares) as beton:
        payloads = [beton.payload(i).tobytes() for i in range(len(beton))]
    side = np.full(5, 32, np.int32)
    corners = set()
    for batch in epoch_of(loader):
        where = crop_boxes(
            loader.spec, epoch=0, indices=batch.indices.numpy(), heights=side, widths=side
        )
        for image, sample, box in zip(batch.images, batch.indices.tolist(), where, strict=True):
            top, left, height, width, flip = box.tolist()
            assert (height, width) == (32, 32)
            corners.add((top, left))
            padded = ImageOps.expand(_jpeg(payloads[sample]), 4)
            expected = padded.crop((left + 4, top + 4, left + 36, top + 36))
            if flip:
                expected = ImageOps.mirror(expected)
            wanted = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()
            # FFCV decodes with the fast DCT, a level or two off libjpeg's default.
            assert (image - wanted).abs().max() <= (8 if name == "ffcv" else 0)
            border = torch.ones(32, 32, dtype=torch.bool)
            rows, columns = slice(max(-top, 0), min(32, 32 - top)), slice(max(-left, 0), 32 - left)
            border[rows, columns] = False
            border = border.flip(1) if flip else border
            assert not image[:, border].any() and image[:, ~border].amax(0).min() > 10
    assert len(corners) > 6


def _jpeg(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data)).convert("RGB")


@pytest.mark.parametrize("name", REAL)
def test_a_crop_larger_than_the_image_is_refused(open_engine, name: str) -> None:
    with pytest.raises(Exception, match="too small for a crop of 500"):
        epoch_of(open_engine(name, crop=RandomCrop(500, padding=4)))


ORIENTED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera stores an upright image for each orientation tag: the inverse of the correction."""


@pytest.fixture(scope="module")
def oriented(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Image.Image]:
    """One upright image, stored with every EXIF orientation, as a folder and as a beton."""
    root = tmp_path_factory.mktemp("oriented")
    upright = smooth_image(5, 40, 64)
    for tag in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = tag
        stored = upright.transpose(ORIENTED[tag]) if tag in ORIENTED else upright
        save_jpeg(root / "data" / "x" / f"{tag}.jpg", stored, exif=exif, quality=98)
    write_beton(SampleIndex.from_folder(root / "data"), root / "o.beton", workers=1)
    return root / "data", root / "o.beton", upright


@pytest.mark.parametrize("name", REAL)
def test_every_engine_serves_upright_images(
    open_engine, oriented: tuple[Path, Path, Image.Image], name: str
) -> None:
    data, beton, upright = oriented
    engine, _, kind = name.partition("-")
    where = beton if kind == "beton" else data
    loader = open_engine(
        f"{engine}-{where}", batch_size=8, crop=CenterCrop(40, None), flip=False, shuffle=False
    )
    (batch,) = epoch_of(loader)
    expected = torch.from_numpy(np.array(upright.crop((12, 0, 52, 40)))).permute(2, 0, 1).float()
    for tag, image in enumerate(batch.images, 1):
        assert (image - expected).abs().mean() < 4, f"orientation {tag}"
