"""The DALI engine: partial reads, prefetching, timeouts."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from pipelines.beton.reader import Beton
from pipelines.conversion.convert import write_beton
from pipelines.datasets.index import SampleIndex
from pipelines.loader import open_loader
from pipelines.spec import (
    LoaderSpec,
    RandomResizedCrop,
)
from tests.support.engines import epoch_of
from tests.support.images import save_jpeg

pytestmark = [pytest.mark.dali, pytest.mark.timeout(120)]


def test_dali_is_given_what_a_crop_needs(open_engine, tmp_path: Path) -> None:
    """DALI decodes the same pixels from the part as from the whole image."""
    for i, image in enumerate(load_sample_images().images):
        save_jpeg(tmp_path / "d" / "x" / f"{i}.jpg", Image.fromarray(image), subsampling=2)
    write_beton(SampleIndex.from_folder(tmp_path / "d"), tmp_path / "d.beton", workers=1)
    options = {"batch_size": 2, "crop": RandomResizedCrop(64, scale=(0.08, 0.3))}
    part = open_engine(f"dali-{tmp_path / 'd.beton'}", **options)
    whole = open_engine(f"dali-{tmp_path / 'd'}", **options)
    for epoch in range(6):
        (ours,), (theirs,) = epoch_of(part, epoch), epoch_of(whole, epoch)
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.images, theirs.images)
    assert part.digest == whole.digest
    given, *_ = part.source._feed._batch(0, 0, np.arange(2))
    with Beton.open(tmp_path / "d.beton") as beton:
        assert sum(map(len, given)) < 0.6 * beton.sizes.sum()


def test_dali_resizes_while_the_consumer_works(open_engine) -> None:
    source = open_engine("dali-beton").source
    crops = source.epoch(0)
    held = next(crops)
    before = held.images.clone()
    (ahead,) = source._graph._ready
    done = ahead.result(30)  # nobody has requested it
    assert done.place == (0, 1) and torch.equal(held.images, before)
    assert torch.equal(next(crops).images, done.images) and not torch.equal(done.images, before)


def test_dali_names_the_time_that_it_waited(open_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, stuck = open_engine("dali-beton", timeout=0.6), threading.Event()
    monkeypatch.setattr("pipelines.engines.dali.source.splice_batch", lambda *_args: stuck.wait(60))
    try:
        with pytest.raises(TimeoutError, match="for 1 s"):
            epoch_of(loader)
        begin = time.monotonic()
        loader.close()  # does not wait for the stuck feed, and returns
        assert time.monotonic() - begin < 20
    finally:
        stuck.set()


def test_dali_that_is_stuck_is_left_behind(open_engine) -> None:
    loader, stuck, asked = (
        open_engine("dali-beton", timeout=0.6),
        threading.Event(),
        threading.Event(),
    )

    class Stuck:
        def run(self) -> None:
            asked.set()
            stuck.wait(60)

    loader.source._graph._pipe = Stuck()
    try:
        with pytest.raises(TimeoutError, match="no batch from DALI for 1 s"):
            epoch_of(loader)
        begin = time.monotonic()
        loader.close()
        assert asked.is_set() and time.monotonic() - begin < 20
    finally:
        stuck.set()


def test_dali_cannot_mask_and_says_so(folder: Path) -> None:
    with pytest.raises(
        ValueError, match="cannot mask undecodable samples: max_undecodable must be 0"
    ):
        open_loader(LoaderSpec(data=str(folder), engine="dali", max_undecodable=1))
