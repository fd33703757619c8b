"""Crop boxes and flips: distributions against torchvision, pure function of seed and sample."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torchvision.transforms.v2 import RandomResizedCrop as TorchvisionCrop

from pipelines.sampling.crops import can_exceed_image, crop_boxes, padded_side
from pipelines.sampling.random_bits import digest64, uniforms
from pipelines.spec import (
    CenterCrop,
    Crop,
    LoaderSpec,
    RandomCrop,
    RandomResizedCrop,
    Resize,
)

pytestmark = pytest.mark.timeout(60)

Int32 = npt.NDArray[np.int32]


def draw(
    crop: Crop,
    heights: object,
    widths: object,
    *,
    epoch: int = 0,
    start: int = 0,
    **options: object,
) -> Int32:
    h, w = np.atleast_1d(np.array(heights, np.int32)), np.atleast_1d(np.array(widths, np.int32))
    spec = LoaderSpec(crop=crop, **options)  # type: ignore[arg-type]
    indices = np.arange(start, start + len(h), dtype=np.int64)
    return crop_boxes(spec, epoch=epoch, indices=indices, heights=h, widths=w)


def sizes(n: int) -> tuple[Int32, Int32]:
    """Many image sizes, the extreme ones first."""
    g = np.random.default_rng(0)
    h = np.exp(g.uniform(0, 8, n)).astype(np.int32)
    w = np.exp(g.uniform(0, 8, n)).astype(np.int32)
    h[:6], w[:6] = (1, 5000, 2, 1, 3, 2), (1, 2, 5000, 7, 1, 2)
    return h, w


def inside(b: Int32, h: Int32, w: Int32) -> npt.NDArray[np.bool_]:
    top, left, height, width = b[:, :4].T
    return (
        (top >= 0) & (left >= 0) & (height > 0) & (width > 0)
        & (top + height <= h) & (left + width <= w)
    )  # fmt: skip


@pytest.mark.parametrize(
    "crop",
    [
        RandomResizedCrop(),
        RandomResizedCrop(scale=(1e-6, 1e-5)),
        RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0)),
        CenterCrop(224, 256),
        CenterCrop(224, 224),
        RandomCrop(224, padding=0, resize=256),
        Resize(),
    ],
    ids=str,
)
def test_boxes_lie_inside_the_image(crop: Crop) -> None:
    assert not can_exceed_image(crop)
    h, w = sizes(5000)
    for epoch in range(3):
        assert inside(draw(crop, h, w, epoch=epoch), h, w).all()
    assert padded_side(crop, h, w) == 1 or not isinstance(crop, RandomResizedCrop)


@pytest.mark.parametrize(
    "crop",
    [RandomCrop(32, 4), RandomCrop(32, 4, resize=36), CenterCrop(32, None), CenterCrop(40, 32)],
    ids=str,
)
def test_boxes_that_can_exceed_the_image_do(crop: Crop) -> None:
    assert can_exceed_image(crop)
    h, w = np.full(2000, 30, np.int32), np.full(2000, 33, np.int32)
    b = draw(crop, h, w)
    assert not inside(b, h, w).all()
    assert b[:, 2:4].max() == padded_side(crop, h, w)


def torchvision_shapes(count: int, height: int, width: int) -> npt.NDArray[np.float64]:
    torch.manual_seed(0)
    transform = TorchvisionCrop(224)
    blank = torch.empty(3, height, width)
    params = [transform.make_params([blank]) for _ in range(count)]
    return np.array([[p["top"], p["left"], p["height"], p["width"]] for p in params], np.float64)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 640)])
def test_random_resized_crop_is_torchvisions(height: int, width: int) -> None:
    n = 50_000  # ours are cheap, so that torchvision's can be few
    ours = draw(RandomResizedCrop(), np.full(n, height), np.full(n, width))[:, :4].astype(float)
    theirs = torchvision_shapes(5000, height, width)

    def summary(b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        top, left, h, w = b.T
        room_y, room_x = np.maximum(height - h, 1), np.maximum(width - w, 1)
        columns = (h * w / (height * width), np.log(w / h), top / room_y, left / room_x)
        return np.array([[c.mean(), c.std()] for c in columns])

    # The means are known to about 0.004; 0.018 is four standard errors of the difference.
    assert np.abs(summary(ours) - summary(theirs)).max() < 0.018


def test_the_fallback_is_torchvisions() -> None:
    """No draw fits such a long image: the largest centred box of an allowed shape is taken."""
    for height, width in ((10, 1000), (1000, 10), (2, 5000), (33, 3001)):
        transform = TorchvisionCrop(224, scale=(0.9999, 1.0))
        p = transform.make_params([torch.empty(3, height, width)])
        same = draw(RandomResizedCrop(scale=(0.9999, 1.0)), height, width)[0, :4]
        assert same.tolist() == [p["top"], p["left"], p["height"], p["width"]]


def test_flips_are_half_and_independent_of_the_crop() -> None:
    n = 20_000
    b = draw(RandomResizedCrop(), np.full(n, 300), np.full(n, 400))
    flip = b[:, 4].astype(float)
    assert set(b[:, 4].tolist()) == {0, 1} and abs(flip.mean() - 0.5) < 0.015
    for column in b[:, :4].T:
        assert abs(np.corrcoef(flip, column)[0, 1]) < 0.03
    again = draw(RandomResizedCrop(), np.full(n, 300), np.full(n, 400), epoch=1)[:, 4]
    assert abs((flip == again).mean() - 0.5) < 0.015
    assert not draw(Resize(), np.full(99, 3), np.full(99, 3), flip=False)[:, 4].any()


def test_places_of_a_padded_crop_are_uniform() -> None:
    n = 20_000
    b = draw(RandomCrop(32, padding=4), np.full(n, 32), np.full(n, 32))
    for column in (b[:, 0], b[:, 1]):
        counts = np.bincount(column + 4, minlength=9)
        assert len(counts) == 9 and np.abs(counts / n - 1 / 9).max() < 0.012
    assert (b[:, 2:4] == 32).all()


def test_uniforms_are_uniform() -> None:
    u = uniforms(0, 0, np.arange(20_000, dtype=np.int64), count=23)
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 0.01 and np.abs(u.std(0) - 12**-0.5).max() < 0.01
    off_diagonal = np.corrcoef(u.T) - np.eye(u.shape[1])
    assert np.abs(off_diagonal).max() < 0.03
    neighbours = np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]
    assert abs(neighbours) < 0.03


@pytest.mark.parametrize("crop", [RandomResizedCrop(), RandomCrop(8, 2)], ids=str)
def test_a_box_belongs_to_its_sample(crop: Crop) -> None:
    h, w = np.random.default_rng(2).integers(8, 400, (2, 300), np.int32)
    spec = LoaderSpec(crop=crop)
    every = np.arange(300, dtype=np.int64)
    whole = crop_boxes(spec, epoch=2, indices=every, heights=h, widths=w)
    for some in (
        np.array([7]),
        np.array([299, 0, 5, 5]),
        np.random.default_rng(1).permutation(300),
    ):
        part = crop_boxes(spec, epoch=2, indices=every[some], heights=h[some], widths=w[some])
        assert np.array_equal(part, whole[some])
    other = crop_boxes(spec, epoch=3, indices=every, heights=h, widths=w)
    seeded = crop_boxes(LoaderSpec(crop=crop, seed=1), epoch=2, indices=every, heights=h, widths=w)
    assert (other != whole).any(1).mean() > 0.8 and (seeded != whole).any(1).mean() > 0.8


def test_boxes_are_pinned() -> None:
    """A run resumed with a later version must see the same crops: these may not change."""
    b = draw(RandomResizedCrop(), [375, 500, 32], [500, 375, 32], epoch=1, start=10, seed=3)
    assert b.tolist() == PINNED
    assert digest64(1, np.arange(10, 13, dtype=np.int64), b) == PINNED_DIGEST


PINNED = [[37, 29, 128, 164, 0], [183, 4, 260, 235, 0], [13, 0, 19, 21, 1]]
PINNED_DIGEST = 0xF9C7B288534A9046


def test_center_crop_is_the_middle() -> None:
    assert draw(CenterCrop(224, 256), 512, 1024, flip=False).tolist() == [[32, 288, 448, 448, 0]]
    assert draw(CenterCrop(10, None), 20, 30, flip=False).tolist() == [[5, 10, 10, 10, 0]]
    assert draw(CenterCrop(10, None), 6, 30, flip=False).tolist() == [[-2, 10, 10, 10, 0]]
    assert draw(Resize(5), 6, 30, flip=False).tolist() == [[0, 0, 6, 30, 0]]


def test_a_crop_that_does_not_fit_is_refused_with_a_message() -> None:
    with pytest.raises(ValueError, match="an image of 30x20 pixels with 4 pixels of padding"):
        draw(RandomCrop(32, 4), [40, 20], [40, 30])


def test_the_digest_does_not_depend_on_order() -> None:
    h, w = sizes(500)
    b = draw(RandomResizedCrop(), h, w)
    indices = np.arange(500, dtype=np.int64)
    whole = digest64(0, indices, b)
    mixed = np.random.default_rng(0).permutation(500)
    assert digest64(0, indices[mixed], b[mixed]) == whole
    parts = digest64(0, indices[:123], b[:123]) + digest64(0, indices[123:], b[123:])
    assert parts % 2**64 == whole
    assert digest64(1, indices, b) != whole
    for column in range(5):
        changed = b.copy()
        changed[77, column] += 1
        assert digest64(0, indices, changed) != whole
    swapped = indices.copy()
    swapped[[3, 4]] = swapped[[4, 3]]  # the same boxes, assigned to other samples
    assert digest64(0, swapped, b) != whole
