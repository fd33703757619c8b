"""Color jitter and lighting, against torchvision's operations and plain NumPy."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv

from pipelines.batch import Batch
from pipelines.device.color_jitter import JitterParams, draw_jitter, jitter, jitter_views
from pipelines.loader import open_loader
from pipelines.spec import IMAGENET, ColorJitter, LoaderSpec, RandomResizedCrop
from tests.support.batches import check_batch

pytestmark = pytest.mark.timeout(120)

ALL = ColorJitter(brightness=0.4, contrast=0.5, saturation=0.6, hue=0.3, lighting=0.1)
OPERATIONS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def torchvision_jitter(image: torch.Tensor, tints: JitterParams, i: int) -> torch.Tensor:
    """Apply torchvision's functions in turn to one uint8 (3, S, S) image."""
    for operation in tints.order[i]:
        image = OPERATIONS[operation](image, float(tints.factors[i, operation]))
    return image


def test_bit_equal_to_torchvision() -> None:
    """All orders of four operations, on noise, grey, black, white and uniform colors."""
    generator = torch.Generator().manual_seed(0)
    tints = draw_jitter(ALL, seed=3, epoch=5, indices=np.arange(60))
    assert len({tuple(order) for order in tints.order}) > 15
    images = torch.randint(0, 256, (60, 3, 24, 24), dtype=torch.uint8, generator=generator)
    images[:, :, :4] = images[:, :1, :4]
    images[:, :, 4:6], images[:, :, 6:8] = 0, 255
    images[:, :, 8:12] = images[:, :, 8:9, :1]
    found = jitter(images.float(), tints)
    for i, image in enumerate(images):
        assert torch.equal(found[i], torchvision_jitter(image, tints, i).float()), i


def test_draws_do_not_depend_on_company_and_fill_their_ranges() -> None:
    indices = np.random.default_rng(0).permutation(4000)
    tints = draw_jitter(ALL, seed=0, epoch=2, indices=indices)
    alone = draw_jitter(ALL, seed=0, epoch=2, indices=indices[1234:1235])
    for whole, one in zip(tints, alone, strict=True):
        np.testing.assert_array_equal(whole[1234:1235], one)
    for seed, epoch in ((1, 2), (0, 3)):
        other = draw_jitter(ALL, seed=seed, epoch=epoch, indices=indices)
        assert abs(np.corrcoef(tints.factors[:, 0], other.factors[:, 0])[0, 1]) < 0.06
    low, high = [0.6, 0.5, 0.4, -0.3], [1.4, 1.5, 1.6, 0.3]
    np.testing.assert_allclose(tints.factors.min(0), low, atol=0.01)
    np.testing.assert_allclose(tints.factors.max(0), high, atol=0.01)
    orders, counts = np.unique(tints.order, axis=0, return_counts=True)
    assert sorted(map(tuple, orders)) == sorted(itertools.permutations(range(4)))
    assert counts.min() > 4000 / 24 * 0.7
    # Three independent normal numbers along the principal components give this covariance.
    directions = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    spread = directions @ np.diag([0.2175, 0.0188, 0.0045]) * 0.1 * 255
    np.testing.assert_allclose(np.cov(tints.shifts.T), spread @ spread.T, rtol=0.15)
    assert abs(tints.shifts.mean()) < 0.3


def test_what_is_not_asked_for_is_left_out() -> None:
    assert draw_jitter(
        replace(ALL, hue=0.0), seed=0, epoch=0, indices=np.arange(9)
    ).order.shape == (9, 3)
    still = draw_jitter(ColorJitter(contrast=0.1), seed=0, epoch=0, indices=np.arange(9))
    assert (still.order == 1).all() and (still.shifts == 0).all()
    assert (still.factors[:, [0, 2]] == 1).all() and (still.factors[:, 3] == 0).all()
    for senseless in ({"brightness": -0.1}, {"hue": 0.6}):
        with pytest.raises(ValueError, match=rf"^ColorJitter\.{next(iter(senseless))} must be"):
            ColorJitter(**senseless)
    with pytest.raises(ValueError, match="needs views=plain"):
        LoaderSpec(color_jitter=ALL)


def test_lighting_is_added_last_and_not_rounded() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8, generator=generator)
    tints = draw_jitter(ALL, seed=0, epoch=0, indices=np.arange(5))
    found = jitter_views(images, tints, normalize=IMAGENET, dtype=torch.float32)
    for i, image in enumerate(images):
        jittered = torchvision_jitter(image.permute(2, 0, 1), tints, i).double().numpy()
        lit = jittered + tints.shifts[i, :, None, None]
        mean, std = np.array(IMAGENET.mean), np.array(IMAGENET.std)
        expected = (lit - mean[:, None, None]) / std[:, None, None]
        np.testing.assert_allclose(found[i].numpy(), expected, atol=2e-6)


def batches(spec: LoaderSpec, epoch: int, start: int = 0) -> list[Batch]:
    with open_loader(spec) as loader:
        return list(loader.epoch(epoch, start_step=start))


def test_through_the_loader(folder: Path, beton: Path) -> None:
    """A sample gets the same colors from files, from a beton, resumed, and at any batch size."""
    spec = LoaderSpec(
        data=str(folder), engine="folder", batch_size=6, crop=RandomResizedCrop(20), views="plain",
        workers=1, color_jitter=ALL, seed=4,
    )  # fmt: skip
    found = batches(spec, 1)
    plain = batches(replace(spec, color_jitter=ColorJitter()), 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET.mean, IMAGENET.std))
    images = {}
    for batch, before in zip(found, plain, strict=True):
        check_batch(batch, views=1, batch_size=6, size=20)
        assert torch.equal(batch.targets, before.targets)
        tints = draw_jitter(ALL, seed=4, epoch=1, indices=batch.indices.numpy())
        crops = (before.images * std + mean).round().to(torch.uint8)
        for i in range(6):
            lit = (
                torchvision_jitter(crops[i], tints, i)
                + torch.from_numpy(tints.shifts[i])[:, None, None]
            )
            expected = (lit - mean[0]) / std[0]
            torch.testing.assert_close(batch.images[i], expected, atol=1e-5, rtol=0)
            images[int(batch.indices[i])] = batch.images[i]
    resumed = batches(spec, 1, start=4)
    for batch, again in zip(found[4:], resumed, strict=True):
        assert torch.equal(batch.images, again.images)
    for batch in batches(replace(spec, data=str(beton), batch_size=9), 1):
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            if index in images:  # one order drops the last samples of the other
                assert torch.equal(image, images[index])
    half = replace(spec, color_jitter=replace(ALL, lighting=0.0))
    assert not torch.equal(batches(half, 1)[0].images, found[0].images)
    assert not torch.equal(batches(spec, 2)[0].images, found[0].images)
