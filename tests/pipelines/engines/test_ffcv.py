"""The FFCV engine: spliced decoding, progressive resizing, regions, its decoding thread."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from pipelines.batch import RawBatch, Regions
from pipelines.beton.reader import Beton
from pipelines.beton.segments import segments_path
from pipelines.conversion.convert import write_beton
from pipelines.datasets.index import SampleIndex
from pipelines.imaging.decode import ImageError
from pipelines.imaging.resize import scratch_size
from pipelines.spec import LoaderSpec, RandomCrop, RandomResizedCrop, Shard
from tests.support.engines import engine_module
from tests.support.resize import resize_into

engine = engine_module("ffcv", "source")
kernels = engine_module("ffcv", "kernels")

pytestmark = pytest.mark.timeout(200)

COUNT, BATCH, STEPS = 14, 4, 3


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A beton of photographs with fine detail, several sizes and restart markers."""
    root = tmp_path_factory.mktemp("ffcv")
    (root / "data" / "x").mkdir(parents=True)
    for i in range(COUNT):
        whole = Image.fromarray(load_sample_images().images[i % 2])
        image = whole.resize((150 + 7 * i, 190 - 5 * i), Image.Resampling.BICUBIC)
        image = image.convert("L") if i == 5 else image
        image.save(root / "data" / "x" / f"{i:02}.jpg", quality=90, subsampling=i % 3)
    write_beton(SampleIndex.from_folder(root / "data"), root / "p.beton", workers=1)
    return root / "p.beton"


def source_of(data: Path | Beton, *, workers: int = 1, **options: Any) -> engine.FfcvSource:
    spec = LoaderSpec(
        data="p.beton", **{"batch_size": BATCH, "crop": RandomResizedCrop(32), **options}
    )
    opened = data if isinstance(data, Beton) else Beton.open(data)
    return engine.FfcvSource(opened, spec, shard=Shard(), workers=workers)


def copied(batches: Iterator[RawBatch]) -> list[RawBatch]:
    """Copy the batches, because the engine reuses their memory."""
    kept = []
    for batch in batches:
        images = batch.images
        if isinstance(images, Regions):
            kept.append(batch._replace(images=images._replace(pixels=images.pixels.clone())))
        else:
            kept.append(batch._replace(images=images.clone()))
    return kept


def epochs(source: engine.FfcvSource, *numbers: int) -> list[RawBatch]:
    try:
        return [batch for number in numbers for batch in copied(source.epoch(number))]
    finally:
        source.close()


def same(a: list[RawBatch], b: list[RawBatch]) -> bool:
    assert len(a) == len(b) > 0
    return all(torch.equal(x.images, y.images) for x, y in zip(a, b, strict=True))  # type: ignore[arg-type]


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if isinstance(t, engine.DecodingThread)]


def test_spliced_crops_equal_those_of_whole_images(beton: Path) -> None:
    opened = Beton.open(beton)
    assert opened.segments is not None and (opened.segments.records["interval"] > 0).all()
    spliced = epochs(source_of(opened), 0, 1, 2)
    assert same(spliced, epochs(source_of(replace(Beton.open(beton), segments=None)), 0, 1, 2))
    assert same(spliced, epochs(source_of(beton, workers=3), 0, 1, 2))
    assert all(batch.valid.all() for batch in spliced)


def test_a_side_file_that_lies_about_a_sample_is_named(
    beton: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "p.beton"
    shutil.copy(beton, copy)
    with Beton.open(beton) as opened:
        assert opened.segments is not None
        first = int(opened.segments.records["first"][6])
    side = bytearray(segments_path(beton).read_bytes())
    side[48 + 2 * first] ^= 1  # its first segment's length
    segments_path(copy).write_bytes(side)
    source = source_of(copy, max_undecodable=1, shuffle=False)
    for number, batch in enumerate(epochs(source, 0)):
        assert (~batch.valid).nonzero().flatten().tolist() == ([2] if number == 1 else [])
        assert isinstance(batch.images, torch.Tensor)
        assert not batch.images[~batch.valid].any()
    assert "p.beton: sample 6: its bytes do not fit the side file" in caplog.text
    with pytest.raises(ImageError, match=r"sample 6: .*max_undecodable is 0"):
        epochs(source_of(copy, shuffle=False), 0)


def test_each_epoch_has_its_side_in_the_same_buffers(beton: Path) -> None:
    sides = ((0, 16), (1, 24), (3, 32))
    source = source_of(beton, resolution_schedule=sides)
    compiled, places = len(kernels.decode_lane.signatures), set()
    for number, side in ((0, 16), (1, 24), (2, 24), (3, 32), (0, 16)):
        expected = epochs(source_of(beton, crop=RandomResizedCrop(side)), number)
        for ours, theirs in zip(source.epoch(number), expected, strict=True):
            assert isinstance(ours.images, torch.Tensor) and ours.images.is_contiguous()
            assert ours.images.shape == (BATCH, side, side, 3)
            assert torch.equal(ours.images, theirs.images)  # type: ignore[arg-type]
            assert torch.equal(ours.boxes, theirs.boxes)
            places.add(ours.images.data_ptr())
    assert len(places) <= 5 and len(kernels.decode_lane.signatures) == max(compiled, 1)
    source.close()


def test_regions_are_what_the_cpu_would_have_resized(beton: Path) -> None:
    resized = epochs(source_of(beton), 0, 1)
    for cut, small in zip(epochs(source_of(beton, resize="device"), 0, 1), resized, strict=True):
        regions = cut.images
        assert isinstance(regions, Regions) and regions.side == 32
        assert torch.equal(cut.boxes, small.boxes) and torch.equal(cut.indices, small.indices)
        assert torch.equal(regions.shapes, cut.boxes[:, 2:4])
        assert torch.equal(regions.flips, cut.boxes[:, 4] != 0)
        used = 0
        for i, (h, w) in enumerate(regions.shapes.tolist()):
            assert regions.offsets[i] == used
            region = regions.pixels[used : used + h * w * 3].view(h, w, 3).numpy()
            used += h * w * 3
            out = np.empty((32, 32, 3), np.uint8)
            scratch = np.empty(scratch_size(h, w, 32), np.uint32)
            resize_into(region, (0, 0, h, w), out, bool(regions.flips[i]), scratch)
            assert np.array_equal(out, small.images[i].numpy())  # type: ignore[index]
        assert used == len(regions.pixels)


def test_regions_are_black_outside_the_image(beton: Path) -> None:
    options = {"crop": RandomCrop(120, padding=20), "flip": False}
    crops = epochs(source_of(beton, **options), 0)
    for cut, whole in zip(
        epochs(source_of(beton, resize="device", **options), 0), crops, strict=True
    ):
        assert isinstance(cut.images, Regions)
        assert (cut.boxes[:, :2] < 0).any()
        # Nothing to resize: the region is the crop.
        assert torch.equal(cut.images.pixels, whole.images.flatten())  # type: ignore[union-attr]
        for (top, left), crop in zip(cut.boxes[:, :2].tolist(), whole.images, strict=True):
            assert not crop[: max(-top, 0)].any() and not crop[:, : max(-left, 0)].any()
            assert crop[max(-top, 0) :, max(-left, 0) :].any()


def test_a_refused_sample_is_looked_at_again_as_a_region(
    beton: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An early end marker is only a warning for libjpeg; torchvision continues to decode."""
    copy = tmp_path / "p.beton"
    shutil.copy(beton, copy)
    with Beton.open(beton) as opened, copy.open("r+b") as file:
        file.seek(int(opened.offsets[1] + opened.sizes[1] // 2))
        file.write(b"\xff\xd6" * 2)
        size = int(opened.sizes[2])
        file.seek(int(opened.offsets[2]))
        file.write(bytes(size))
    options = {
        "shuffle": False,
        "max_undecodable": 1,
        "flip": False,
        "crop": RandomCrop(100, padding=0),
    }
    regions = epochs(source_of(copy, resize="device", **options), 0)
    crops = epochs(source_of(copy, **options), 0)
    assert regions[0].valid.tolist() == crops[0].valid.tolist() == [True, True, False, True]
    images = regions[0].images
    assert isinstance(images, Regions)
    assert torch.equal(images.pixels, crops[0].images.flatten())  # type: ignore[union-attr]
    assert images.pixels.view(4, -1).any(1).tolist() == [True, True, False, True]
    assert "sample 2" in caplog.text


def test_training_continues_into_the_next_epoch(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = threading.Event()
    decoded = []
    real = engine.RingLoader.decode

    def spy(self: Any, step: engine.Step, number: int) -> engine.DecodedBatch:
        decoded.append((step.epoch, step.step))
        if step.epoch == 5:
            ahead.set()
        return real(self, step, number)

    expected = {n: epochs(source_of(beton), n) for n in (4, 5, 9)}
    monkeypatch.setattr(engine.RingLoader, "decode", spy)
    source = source_of(beton)
    assert same(copied(source.epoch(4)), expected[4])
    assert ahead.wait(20)  # before it is requested
    (thread,) = threads()
    assert same(copied(source.epoch(5)), expected[5])
    assert threads() == [thread]
    assert decoded[: 2 * STEPS] == [(4, 0), (4, 1), (4, 2), (5, 0), (5, 1), (5, 2)]
    # Another epoch: the prepared batches are discarded and a new thread starts there.
    assert same(copied(source.epoch(9)), expected[9])
    assert same(copied(source.epoch(4, 1)), expected[4][1:])
    assert len(threads()) == 1 and thread not in threads()
    source.close()
    assert not threads()


def test_evaluation_decodes_what_is_asked_for_and_ends(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    real = engine.RingLoader.decode

    def spy(self: Any, step: engine.Step, number: int) -> engine.DecodedBatch:
        decoded.append((step.epoch, step.step))
        return real(self, step, number)

    monkeypatch.setattr(engine.RingLoader, "decode", spy)
    source = source_of(beton, shuffle=False, drop_last=False)
    for number in (0, 1):
        assert len(copied(source.epoch(number))) == 4
        assert not threads()
    assert decoded == [(epoch, step) for epoch in (0, 1) for step in range(4)]
    source.close()


def test_a_dropped_source_takes_its_thread_along(beton: Path) -> None:
    source = source_of(beton)
    copied(source.epoch(0))
    (thread,) = threads()
    del source
    gc.collect()
    thread.join(5)
    assert not threads()


def test_the_number_of_threads_may_change_at_any_batch(beton: Path) -> None:
    expected = epochs(source_of(beton), 0, 1)
    source = source_of(beton, workers=3)
    assert source.workers == 3
    got = []
    for number in (0, 1):
        for step, batch in enumerate(source.epoch(number)):
            got += copied(iter([batch]))
            source.workers = 1 + (step + number) % 3
    assert same(got, expected)
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=rf"workers must be in 1\.\.3, got {wrong}"):
            source.workers = wrong
    source.close()


def test_lanes_share_the_work() -> None:
    """Every sample belongs to exactly one lane, for any number of lanes and samples."""
    for lanes in (1, 2, 3, 7):
        for batch in (1, 4, 13):
            rounds = range(-(-batch // lanes))
            places = [kernels._work_index(n, lane, lanes) for lane in range(lanes) for n in rounds]
            assert sorted(p for p in places if p < batch) == list(range(batch))
