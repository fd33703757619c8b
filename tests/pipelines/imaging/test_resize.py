"""The resize kernel against Pillow's and torchvision's antialiased bilinear filters."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2 import functional as F

from pipelines.imaging.resize import scratch_size
from tests.support.resize import resize_into

pytestmark = pytest.mark.timeout(120)  # the first call compiles

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
GUARD = 64


def ours(source: Pixels, box: Box, side: int, flip: bool = False) -> Pixels:
    """`resize_region` with guard words after the output and the scratch buffer."""
    needed = scratch_size(box[2], box[3], side)
    scratch = np.full(needed + GUARD, 0xA5, np.uint32)
    memory = np.full(side * side * 3 + GUARD, 0x5A, np.uint8)
    out = memory[:-GUARD].reshape(side, side, 3)
    resize_into(source, box, out, flip, scratch[:needed])
    assert (scratch[needed:] == 0xA5).all() and (memory[-GUARD:] == 0x5A).all()
    return out


def pillow(source: Pixels, box: Box, side: int, flip: bool = False) -> Pixels:
    top, left, height, width = box
    region = Image.fromarray(source[top : top + height, left : left + width])
    square = np.asarray(region.resize((side, side), Image.Resampling.BILINEAR))
    return square[:, ::-1] if flip else square


def test_random_boxes_of_photographs_match_pillow_and_torchvision() -> None:
    draw = np.random.default_rng(0)
    photographs = load_sample_images().images
    theirs, torchs, bias = [], [], []
    for i in range(60):
        source = photographs[i % 2]
        height, width = (int(np.exp(draw.uniform(np.log(6), np.log(n)))) for n in source.shape[:2])
        top = int(draw.integers(source.shape[0] - height + 1))
        left = int(draw.integers(source.shape[1] - width + 1))
        box, side, flip = (top, left, height, width), int(draw.integers(4, 230)), bool(i % 3)
        got = ours(source, box, side, flip).astype(np.float64)
        off = got - pillow(source, box, side, flip)
        assert np.abs(off).max() <= 1, (box, side)
        theirs.append(np.abs(off).mean())
        bias.append(off.mean())
        region = torch.from_numpy(source[top : top + height, left : left + width].copy())
        square = F.resize(region.permute(2, 0, 1)[None], [side, side], antialias=True)[0]
        square = square.permute(1, 2, 0).numpy()
        torchs.append(np.abs(got - (square[:, ::-1] if flip else square)).mean())
    assert max(theirs) < 0.4 and np.mean(theirs) < 0.2 and abs(np.mean(bias)) < 0.03
    assert max(torchs) < 0.6 and np.mean(torchs) < 0.3


@pytest.mark.parametrize("flip", [False, True], ids=["", "flip"])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 7, 8, 31, 64])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 40), (40, 1), (5, 5), (6, 6), (2, 7), (3, 9), (300, 6), (9, 500), (257, 130)],
    ids=str,
)
def test_extreme_shapes_of_noise_match_pillow(
    shape: tuple[int, int], side: int, flip: bool
) -> None:
    draw = np.random.default_rng(side)
    source = draw.integers(0, 256, (shape[0] + 3, shape[1] + 2, 3), np.uint8)
    box = (2, 1, *shape)
    off = ours(source, box, side, flip).astype(int) - pillow(source, box, side, flip)
    assert np.abs(off).max() <= 1


def test_strong_reduction_of_a_large_region() -> None:
    """Hundreds of filter taps: more than naive 16-bit weights could represent."""
    source = np.random.default_rng(1).integers(0, 256, (2000, 3000, 3), np.uint8)
    source[:, :1000] = 255
    source[:, 1000:2000] = 0
    got = ours(source, (0, 0, 2000, 3000), 6).astype(int)
    assert np.abs(got - pillow(source, (0, 0, 2000, 3000), 6)).max() <= 2


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("shape", [(3, 3), (50, 70), (500, 333)], ids=str)
def test_a_flat_region_stays_as_it_is(value: int, shape: tuple[int, int]) -> None:
    source = np.full((*shape, 3), value, np.uint8)
    assert (ours(source, (0, 0, *shape), 32) == value).all()


@pytest.mark.parametrize("side", [1, 5, 32])
def test_a_region_of_the_right_size_is_copied(side: int) -> None:
    source = np.random.default_rng(2).integers(0, 256, (side + 9, side + 5, 3), np.uint8)
    region = source[4 : 4 + side, 3 : 3 + side]
    assert np.array_equal(ours(source, (4, 3, side, side), side), region)
    assert np.array_equal(ours(source, (4, 3, side, side), side, flip=True), region[:, ::-1])


@pytest.mark.parametrize("side", [6, 45])
def test_a_flip_mirrors_the_result(side: int) -> None:
    """The filter is symmetric: mirroring the input mirrors the output."""
    source = np.random.default_rng(3).integers(0, 256, (60, 83, 3), np.uint8)
    straight, mirrored = (ours(source, (5, 6, 40, 70), side, flip) for flip in (False, True))
    assert np.array_equal(mirrored, straight[:, ::-1])


def test_pixels_around_the_region_do_not_show() -> None:
    draw = np.random.default_rng(4)
    source = draw.integers(0, 256, (50, 60, 3), np.uint8)
    other = draw.integers(0, 256, source.shape, np.uint8)
    other[10:40, 20:45] = source[10:40, 20:45]
    for side in (3, 16, 64):
        box = (10, 20, 30, 25)
        assert np.array_equal(ours(source, box, side), ours(other, box, side))


_GUARDED = """
import ctypes, mmap
import numpy as np
from pipelines.imaging.resize import resize_region, scratch_size

page = mmap.PAGESIZE
memory = mmap.mmap(-1, 3 * page)
whole = np.frombuffer(memory, np.uint8)
middle = whole[page : 2 * page]
libc = ctypes.CDLL(None, use_errno=True)
for guarded in (whole[:page], whole[2 * page :]):
    assert libc.mprotect(ctypes.c_void_p(guarded.ctypes.data), ctypes.c_size_t(page), 0) == 0
draw = np.random.default_rng(5)
for height, width in [(20, 6), (20, 7), (20, 8), (20, 9), (17, 33), (4, 3), (1, 64), (32, 2)]:
    size = height * width * 3
    for place in (middle[:size], middle[page - size :]):
        image = place.reshape(height, width, 3)
        image[:] = draw.integers(0, 256, image.shape, np.uint8)
        for side in (3, 16, 40):
            out = np.empty((side, side, 3), np.uint8)
            scratch = np.empty(scratch_size(height, width, side), np.uint32)
            start, end = image.ctypes.data, out.ctypes.data
            resize_region(start, 3 * width, height, width, end, side, False, scratch)
print("read nothing else")
"""


def test_nothing_is_read_outside_the_source() -> None:
    """An image at either end of its page, next to pages that may not be read."""
    done = subprocess.run(
        [sys.executable, "-c", _GUARDED], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout) == (0, "read nothing else\n"), done.stderr[-2000:]


def test_rows_of_the_source_may_stand_apart() -> None:
    wide = np.random.default_rng(6).integers(0, 256, (40, 90, 3), np.uint8)
    view = wide[:, 10:70]
    box = (3, 5, 30, 50)
    assert np.array_equal(ours(view, box, 24), ours(np.ascontiguousarray(view), box, 24))


@pytest.mark.parametrize("extent", [1, 2, 7, 64, 501])
def test_scratch_for_the_largest_is_enough_for_less(extent: int) -> None:
    """Sizes that grow over the epochs share one buffer; a smaller size needs more taps."""
    source = np.random.default_rng(7).integers(0, 256, (extent, extent, 3), np.uint8)
    needed = scratch_size(extent, extent, 48)
    scratch = np.full(needed + GUARD, 0xA5, np.uint32)
    for side in range(1, 49):
        out = np.empty((side, side, 3), np.uint8)
        resize_into(source, (0, 0, extent, extent), out, False, scratch[:needed])
        assert (scratch[needed:] == 0xA5).all()
        assert scratch_size(extent, extent, side) <= needed
