"""Progressive resizing: the crop size follows the schedule, the crop boxes do not change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.loader import Loader, open_loader
from pipelines.spec import LoaderSpec, RandomResizedCrop
from tests.support.engines import PIXELS, engines, epoch_of

SIDES = ((0, 12), (1, 32), (3, 20))
BY_EPOCH = [12, 32, 32, 20, 20]
ALL = engines("folder", "dali", "ffcv", "synthetic")


def opened(engine: str, beton: Path, **options: object) -> Loader:
    defaults: dict[str, object] = {
        "data": str(beton),
        "engine": engine,
        "batch_size": 6,
        "crop": RandomResizedCrop(32),
        "views": "plain",
        "normalize": PIXELS,
        "workers": 2,
        "samples": 37,
    }
    return open_loader(LoaderSpec(**{**defaults, **options}))  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ALL)
def test_every_epoch_has_its_side_and_the_same_crops(beton: Path, engine: str) -> None:
    with (
        opened(engine, beton, resolution_schedule=SIDES) as growing,
        opened(engine, beton, resolution_schedule=SIDES) as jumping,
        opened(engine, beton) as constant,
    ):
        for epoch, side in enumerate(BY_EPOCH):  # consecutive epochs: prefetching crosses them
            ours, theirs = epoch_of(growing, epoch), epoch_of(constant, epoch)
            assert {tuple(b.images.shape) for b in ours} == {(6, 3, side, side)}
            assert len(ours) == len(theirs) == 6
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one.indices, other.indices)
                if engine == "synthetic":
                    continue
                if side == 32:
                    assert torch.equal(one.images, other.images)
                # The same region at another scale: smooth images keep their mean color.
                far = (one.images.mean((2, 3)) - other.images.mean((2, 3))).abs().max()
                assert far < 2.5, (epoch, far)
            assert growing.digest == constant.digest != 0
        for epoch in (3, 0, 2):  # in any order, and starting inside an epoch
            (last,) = epoch_of(jumping, epoch, 5)
            assert last.images.shape[2] == BY_EPOCH[epoch]


@pytest.mark.parametrize("engine", engines("folder", "dali", "ffcv"))
def test_a_smaller_side_is_the_crop_of_that_size(beton: Path, engine: str) -> None:
    """Equal to a loader opened with that size: nothing is resized twice."""
    with (
        opened(engine, beton, resolution_schedule=((0, 32), (1, 16))) as progressive,
        opened(engine, beton, crop=RandomResizedCrop(16)) as small,
    ):
        epoch_of(progressive, 0)
        for ours, theirs in zip(epoch_of(progressive, 1), epoch_of(small, 1), strict=True):
            assert torch.equal(ours.images, theirs.images)


@pytest.mark.parametrize("engine", engines("ffcv"))
def test_regions_are_resized_by_the_loader(beton: Path, engine: str) -> None:
    """Equal to resizing in the engine: the same crops of the same size in every epoch."""
    with (
        opened(engine, beton, resolution_schedule=SIDES, views="rotate4") as here,
        opened(engine, beton, resolution_schedule=SIDES, views="rotate4", resize="device") as there,
    ):
        for epoch, side in enumerate(BY_EPOCH[:4]):
            for ours, theirs in zip(epoch_of(here, epoch), epoch_of(there, epoch), strict=True):
                assert theirs.images.shape == (24, 3, side, side)
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert here.digest == there.digest != 0
