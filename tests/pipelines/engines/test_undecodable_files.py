"""Damaged, missing and PNG files in a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.batch import IGNORE
from pipelines.imaging.decode import ImageError
from pipelines.spec import (
    CenterCrop,
)
from tests.support.engines import engines, epoch_of, served
from tests.support.images import save_jpeg, smooth_image

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Eight images in a folder, among them one PNG and one truncated JPEG."""
    for i in range(7):
        save_jpeg(tmp_path / "d" / "x" / f"{i}.jpg", smooth_image(i, 60, 50))
    smooth_image(9, 33, 44).save(tmp_path / "d" / "x" / "8.png")
    broken = tmp_path / "d" / "x" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    return tmp_path / "d"


@pytest.mark.parametrize("name", engines("folder", "dali"))
def test_an_undecodable_file_stops_the_run_by_name(open_engine, damaged: Path, name: str) -> None:
    with pytest.raises(ImageError, match=r"x/3\.jpg"):
        epoch_of(open_engine(f"{name}-{damaged}", batch_size=2))


@pytest.mark.parametrize("name", engines("folder", "dali"))
def test_a_vanished_file_stops_the_run_by_name(open_engine, damaged: Path, name: str) -> None:
    loader = open_engine(f"{name}-{damaged}", batch_size=2, shuffle=False)
    for i in (0, 3):
        (damaged / "x" / f"{i}.jpg").unlink()
    with pytest.raises(ImageError, match=r"x/0\.jpg: a file that does not exist"):
        epoch_of(loader)


@pytest.mark.parametrize("name", engines("folder", "dali"))
def test_png_files_are_images_too(open_engine, damaged: Path, name: str) -> None:
    (damaged / "x" / "3.jpg").unlink()
    loader = open_engine(
        f"{name}-{damaged}", batch_size=7, shuffle=False, flip=False, crop=CenterCrop(30, None)
    )
    (batch,) = epoch_of(loader)
    expected = np.array(smooth_image(9, 33, 44).crop((7, 1, 37, 31)))
    assert np.array_equal(batch.images[6].permute(1, 2, 0).numpy(), expected)


def test_max_undecodable_masks_and_counts(
    open_engine, damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = open_engine(
        f"folder-{damaged}", batch_size=5, max_undecodable=1, views="rotate4", shuffle=False
    )
    for epoch in (1, 2):  # the budget is per epoch
        batches = epoch_of(loader, epoch)
        assert served(batches) == [0, 1, 2, 4, 5, 6, 7]
        assert loader.source.decode_errors.total == epoch
        masked = batches[0]
        assert masked.valid.tolist() == [True, True, True, False, True] * 4
        assert (masked.targets == IGNORE).tolist() == (~masked.valid).tolist()
    assert "x/3.jpg" in caplog.text
    (damaged / "x" / "5.jpg").write_bytes(b"no image")
    with pytest.raises(
        ImageError, match=r"x/5\.jpg: .*2 undecodable this epoch, max_undecodable is 1"
    ):
        epoch_of(loader, 3)


def test_padding_does_not_count_as_undecodable(open_engine, damaged: Path) -> None:
    """The undecodable last sample is repeated to fill the batch: it counts once, not six times."""
    (damaged / "x" / "8.png").rename(damaged / "x" / "0.png")
    (damaged / "x" / "3.jpg").rename(damaged / "x" / "9.jpg")
    loader = open_engine(f"folder-{damaged}", batch_size=13, max_undecodable=1, shuffle=False)
    (batch,) = epoch_of(loader)
    assert loader.source.decode_errors.total == 1 and batch.valid.sum() == 7
