"""Joint transforms: boxes and masks follow the pixels, sizes follow the published formulas."""

from __future__ import annotations

import colorsys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from pipelines.arrays import Float64
from pipelines.dense import transforms
from pipelines.dense.spec import DenseSpec, FitWithin, RatioCrop, ShortSide
from pipelines.dense.transforms import Scene
from tests.support import dense_trees

pytestmark = pytest.mark.timeout(60)


def draws(n: int, seed: int = 0, number: int = 0) -> Float64:
    return transforms.draw_uniforms(DenseSpec(seed=seed), np.full(n, number), np.arange(n))


def scene(seed: int, height: int, width: int) -> tuple[Scene, list[dense_trees.Box]]:
    pixels, boxes = dense_trees.scene(seed, height, width)
    masks = np.zeros((len(boxes), height, width), np.uint8)
    for mask, box in zip(masks, boxes, strict=True):
        mask[box.top : box.bottom, box.left : box.right] = 1
    image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
    corners = torch.tensor([box[1:] for box in boxes], dtype=torch.float32)
    found = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
    return Scene(image, found, tv_tensors.Mask(torch.from_numpy(masks))), boxes


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(60, 80), (97, 131), (240, 320)])
def test_boxes_and_masks_follow_the_pixels(flip: bool, size: tuple[int, int]) -> None:
    for seed in range(5):
        before, boxes = scene(seed, 120, 160)
        after = transforms.resize_scene(before, transforms.ResizePlan(*size, flip, size))
        assert after.image.shape == (3, *size) and after.image.dtype == torch.uint8
        assert after.boxes is not None and after.masks is not None
        assert after.boxes.canvas_size == size and after.boxes.dtype == torch.float32
        for k, box in enumerate(boxes):
            color = torch.tensor(dense_trees.COLORS[box.kind]).view(3, 1, 1)
            there = (after.image.int() - color).abs().amax(0) < 50
            there &= _near(after.boxes[k], size)  # the other object may have the same color
            rows, columns = torch.where(there)
            ends = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            # Half a pixel of the coarser grid, and the blur of the interpolation.
            assert abs(torch.stack(ends) - after.boxes[k]).max() < 1.6
            assert (there != after.masks[k].bool()).sum() < 0.09 * there.sum()
            full = after.masks[k].sum() / ((box[3] - box[1]) * (box[4] - box[2]))
            assert full == pytest.approx(size[0] * size[1] / (120 * 160), rel=0.05)


def _near(box: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    left, top, right, bottom = box.tolist()
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return (x > left - 4) & (x < right + 4) & (y > top - 4) & (y < bottom + 4)


def test_masks_stay_aligned_when_halved() -> None:
    """An edge keeps its position; taking the upper left pixel of three would move it."""
    mask = torch.zeros((1, 9, 9), dtype=torch.uint8)
    mask[:, :, 4:] = 7
    image = tv_tensors.Image(torch.zeros((3, 9, 9), dtype=torch.uint8))
    after = transforms.resize_scene(
        Scene(image, None, tv_tensors.Mask(mask)), transforms.ResizePlan(3, 3, False, (3, 3))
    )
    assert after.masks is not None and after.masks[0, 0].tolist() == [0, 7, 7]


def test_sizes_are_those_of_the_sources() -> None:
    draw = np.random.default_rng(0)
    different = 0
    for height, width, short in draw.integers((100, 100, 480), (1500, 1500, 801), (3000, 3)):
        got = transforms.fit_within(height, width, long=1333, short=short)
        # mmcv's rescale_size, in exact arithmetic.
        scale = min(
            Fraction(1333, int(max(height, width))), Fraction(int(short), int(min(height, width)))
        )
        exact = [int(v) * scale + Fraction(1, 2) for v in (height, width)]
        for side, value in zip(got, exact, strict=True):
            assert (
                side == int(value) or value.denominator == 1
            )  # a tie, which floating point may miss
        # detectron2's ResizeShortestEdge.
        factor = short / min(height, width)
        new = [short, factor * width] if height < width else [factor * height, short]
        if max(new) > 1333:
            new = [v * 1333 / max(new) for v in new]
        theirs = [int(v + 0.5) for v in new]
        assert abs(np.array(got) - theirs).max() <= 1
        different += list(got) != theirs
    assert different < 10
    assert transforms.fit_within(375, 500, long=1333, short=800) == (800, 1067)
    assert transforms.fit_within(333, 1000, long=1333, short=800) == (444, 1333)


def test_scales_and_flips_are_drawn_evenly() -> None:
    lengths = tuple(range(480, 801, 32))
    spec = DenseSpec(geometry=ShortSide(lengths))
    places = [transforms.plan_resize(spec, draw, 500, 600) for draw in draws(3300)]
    counts = np.array([sum(p.height == length for p in places) for length in lengths])
    assert counts.sum() == 3300 and abs(counts - 300).max() < 75  # 4.5 standard deviations
    assert abs(sum(p.flip for p in places) - 1650) < 130
    both = [p.flip for p in places if p.height == 480]
    assert 0.35 < np.mean(both) < 0.65
    assert places[:20] != [transforms.plan_resize(spec, d, 500, 600) for d in draws(20, number=1)]
    assert places[:20] != [transforms.plan_resize(spec, d, 500, 600) for d in draws(20, seed=1)]
    still = replace(spec, train=False, geometry=ShortSide((480,)))
    assert {transforms.plan_resize(still, d, 500, 600) for d in draws(20)} == {
        (480, 576, False, (480, 576))
    }
    assert not any(
        transforms.plan_resize(replace(spec, flip=False), d, 9, 9).flip for d in draws(20)
    )


def test_ratios_of_frames() -> None:
    spec = DenseSpec(geometry=RatioCrop(512, 2048, 512, ratio=(0.5, 2.0)))
    places = [transforms.plan_resize(spec, draw, 375, 500) for draw in draws(1000)]
    heights = np.array([p.height for p in places])
    assert heights.min() >= 256 and heights.max() <= 1024 and heights.min() < 265
    assert abs(heights.mean() - 640) < 35 and heights.max() > 1010
    assert all(p.size == (min(p.height, 512), min(p.width, 512)) for p in places)
    frame = replace(spec, train=False, geometry=FitWithin(2048, 512))
    assert transforms.plan_resize(frame, draws(1)[0], 375, 500)[:2] == (512, 683)
    assert transforms.plan_resize(frame, draws(1)[0], 100, 1000)[:2] == (205, 2048)


def test_crops_of_one_class_are_drawn_again() -> None:
    mask = np.zeros((50, 200), np.uint8)
    mask[:, 100:] = 3
    mask[:10] = 255  # ignored pixels do not count
    crop = RatioCrop(size=50)
    columns = np.array([transforms.choose_corner(mask, crop, draw)[1] for draw in draws(2000)])
    fine = (columns >= 63) & (columns <= 87)  # a quarter of 50 columns on either side of the step
    # 25 of 151 positions qualify; the eleventh draw is taken unconditionally.
    assert fine.mean() == pytest.approx(1 - (126 / 151) ** 11, abs=0.03)
    lax = np.array(
        [transforms.choose_corner(mask, replace(crop, most=1.0), d)[1] for d in draws(2000)]
    )
    assert (
        (lax < 50).mean() < 0.1 < ((lax > 50) & (lax < 63)).mean()
    )  # a single class never qualifies
    rest = columns[~fine]
    assert abs(np.mean(rest < 75) - 0.5) < 0.15 and rest.min() == 0 and rest.max() == 150


def test_crops_of_nothing_that_counts_end_with_the_last_place() -> None:
    mask = np.full((80, 90), 255, np.uint8)
    draw = draws(1)[0]
    draw[-2:] = 0.999, 0.5
    assert transforms.choose_corner(mask, RatioCrop(size=50), draw) == (30, 20)
    assert transforms.choose_corner(mask, RatioCrop(size=100), draw) == (0, 0)


def test_a_cut_is_the_same_of_image_and_mask() -> None:
    before, _ = scene(0, 60, 80)
    after = transforms.crop_scene(before, 20, 10, 50)
    assert torch.equal(after.image, before.image[:, 20:70, 10:60])
    assert after.image.shape == (3, 40, 50)
    assert after.masks is not None and before.masks is not None
    assert torch.equal(after.masks, before.masks[:, 20:70, 10:60])


TINT = {"brighter": 2, "delta": 3, "late": 4, "contrast": 5, "factor": 6}
TINT |= {"saturate": 7, "more": 8, "hue": 9, "turn": 10}


@pytest.mark.parametrize("late", [0.2, 0.7])
@pytest.mark.parametrize("used", ["", "b", "c", "s", "h", "bcsh", "sh"])
def test_colors_against_colorsys(used: str, late: float) -> None:
    draw = np.full(40, 0.9)
    on = {"b": "brighter", "c": "contrast", "s": "saturate", "h": "hue"}
    for letter in used:
        draw[TINT[on[letter]]] = 0.1
    draw[TINT["late"]] = late
    draw[[TINT[name] for name in ("delta", "factor", "more", "turn")]] = 0.8, 0.1, 0.95, 0.85
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    pixels[0, 0] = 77  # grey
    pixels[0, 1] = 0

    def expected(rgb: list[float]) -> list[float]:
        if "b" in used:
            rgb = [min(v + 32 * 0.6, 255) for v in rgb]
        if "c" in used and late < 0.5:
            rgb = [min(v * 0.6, 255) for v in rgb]
        h, s, v = colorsys.rgb_to_hsv(*(v / 255 for v in rgb))
        s = min(s * 1.45, 1) if "s" in used else s
        h = (h + 0.07) % 1 if "h" in used else h
        rgb = [255 * c for c in colorsys.hsv_to_rgb(h, s, v)]
        return [min(c * 0.6, 255) for c in rgb] if "c" in used and late >= 0.5 else rgb

    got = transforms.distort(torch.from_numpy(pixels).permute(2, 0, 1), draw).permute(1, 2, 0)
    want = [[expected([float(c) for c in pixel]) for pixel in row] for row in pixels]
    assert got.dtype == torch.uint8
    assert abs(got.numpy() - np.array(want)).max() < 0.51


def test_each_color_is_changed_half_of_the_time() -> None:
    pixels = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1)
    changed = [not torch.equal(transforms.distort(pixels, draw), pixels) for draw in draws(2000)]
    assert np.mean(changed) == pytest.approx(1 - 1 / 16, abs=0.03)
    duller = draws(500)
    duller[:, [TINT["brighter"], TINT["contrast"], TINT["hue"]]] = 0.9
    found = np.array([transforms.distort(pixels, draw).view(3).tolist() for draw in duller])
    assert (found[:, 0] == 200).all()  # V of HSV is unchanged
    assert found[:, 2].min() == pytest.approx(0, abs=2) and found[:, 2].max() > 120
