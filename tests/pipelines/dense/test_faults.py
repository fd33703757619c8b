"""The dense loader: empty data sets, damaged and stuck images, orientation, threads."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.dense import samples
from pipelines.dense.loader import open_dense
from pipelines.dense.spec import DenseSpec, ShortSide
from pipelines.imaging.decode import ImageError
from pipelines.spec import Normalize
from tests.support import dense_trees
from tests.support.images import save_jpeg, smooth_image

pytestmark = pytest.mark.timeout(60)


def single(tmp_path: Path, size: tuple[int, int] = (40, 60)) -> tuple[DenseSpec, Path]:
    """A data set of one image."""
    path = tmp_path / "zoo/JPEGImages/a.jpg"
    save_jpeg(path, smooth_image(3, *size))
    lines = dense_trees.voc_xml("a", size, [dense_trees.Box(0, 5, 6, 30, 31)], [True])
    dense_trees.write(tmp_path / "zoo/Annotations/a.xml", lines)
    dense_trees.write(tmp_path / "zoo/ImageSets/Main/all.txt", ["a"])
    return DenseSpec(
        "voc:zoo/all", str(tmp_path), geometry=ShortSide((48, 64), 100), workers=2
    ), path


def test_nothing_to_train_on(tmp_path: Path) -> None:
    spec, _ = single(tmp_path)
    with pytest.raises(ValueError, match="voc:zoo/all: no image has a box to train on"):
        open_dense(replace(spec, keep_difficult=False))


def test_damaged_images_stop_the_run_by_name(tmp_path: Path) -> None:
    spec, path = single(tmp_path)
    with open_dense(spec) as loader:
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(ImageError, match=rf"^{path}: ") as failure:
            next(loader.epoch(0))
        assert "\n" not in str(failure.value)
        save_jpeg(path, smooth_image(3, 41, 60))
        with pytest.raises(ImageError, match=rf"^{path}: 60x41 pixels, .* says 60x40"):
            next(loader.epoch(0, start_step=0))
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
            next(loader.epoch(0))


def test_images_stand_upright(tmp_path: Path) -> None:
    spec, path = single(tmp_path)
    plain = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    exif = Image.Exif()
    exif[0x0112] = 6
    save_jpeg(path, smooth_image(3, 60, 40).rotate(90, expand=True), exif=exif)
    whole = replace(spec, train=False, geometry=ShortSide((40,), 100), normalize=plain)
    with open_dense(replace(whole, batch_size=1)) as loader:
        (batch,) = loader.epoch(0)
    assert batch.originals.tolist() == [[60, 40]]
    want = torch.from_numpy(np.array(smooth_image(3, 60, 40))).permute(2, 0, 1)
    assert abs(batch.images[0, :, :60, :40] - want).mean() < 3


def test_a_stuck_image_is_named_and_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec, path = single(tmp_path)
    free = threading.Event()
    monkeypatch.setattr(samples, "_image", lambda *_: free.wait(30))
    monkeypatch.setattr("pipelines.dense.loader._CLOSE_TIMEOUT_SECONDS", 0.2)
    loader = open_dense(replace(spec, timeout=0.3, workers=1))
    with pytest.raises(TimeoutError, match=rf"^{path}: not loaded within 0.3 s"):
        next(loader.epoch(0))
    loader.close()
    assert "1 loading threads are stuck and were abandoned" in caplog.text
    free.set()


def test_threads_end_and_use_one_core_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores: list[int] = []
    image = samples._image

    def counted(*args: object) -> object:
        cores.append(torch.get_num_threads())
        return image(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(samples, "_image", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loader = open_dense(replace(single(tmp_path)[0], workers=3, steps_per_epoch=9))
        running = [t for t in threading.enumerate() if t.name.startswith("dense-")]
        assert len(running) >= 3
        list(loader.epoch(0))
        assert set(cores) == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    loader.close()
    assert not any(thread.is_alive() for thread in running)
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(loader.epoch(0))
