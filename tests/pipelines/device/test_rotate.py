"""The four rotations, bit for bit against Pillow and torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.batch import Regions
from pipelines.device.rotate import normalize_views, rotate4
from pipelines.imaging.resize import scratch_size
from pipelines.spec import CIFAR10, IMAGENET, Normalize
from tests.support.resize import resize_into

pytestmark = pytest.mark.timeout(60)

PIXELS = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
TURNS = (
    None,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
)
SIZES = [1, 2, 5, 32, 33, 224]


def noise(size: int, batch: int = 3, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)
    return pixels.to(device)


def check_against_pillow(size: int, device: str) -> None:
    crops = noise(size, device=device)
    images, labels = rotate4(crops, normalize=PIXELS)
    assert images.device == labels.device == crops.device
    assert images.shape == (12, 3, size, size) and images.dtype == torch.float32
    assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for row, label in enumerate(labels.tolist()):
        image = Image.fromarray(crops[row % 3].cpu().numpy())
        turn = TURNS[label]
        turned = image if turn is None else image.transpose(turn)
        assert turned.tobytes() == image.rotate(90 * label).tobytes()
        got = images[row].permute(1, 2, 0).to(torch.uint8).cpu()
        assert np.array_equal(got.numpy(), np.asarray(turned))
        straight = crops[row % 3].permute(2, 0, 1).float()
        assert torch.equal(images[row], torch.rot90(straight, label, (1, 2)))


@pytest.mark.parametrize("size", SIZES)
def test_views_are_pillows_rotations(size: int) -> None:
    check_against_pillow(size, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_views_are_pillows_rotations_on_a_gpu(size: int) -> None:
    check_against_pillow(size, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_and_cpu_agree_bit_for_bit(dtype: torch.dtype) -> None:
    here, _ = rotate4(noise(33), normalize=IMAGENET, dtype=dtype)
    there, _ = rotate4(noise(33, device="cuda"), normalize=IMAGENET, dtype=dtype)
    assert torch.equal(here, there.cpu())
    assert there.is_contiguous(memory_format=torch.channels_last)


def test_directions_on_a_readable_image() -> None:
    """Counter-clockwise: the top right corner goes to the top left at 90 degrees."""
    corners = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    corners[0, :, :, 0] = torch.tensor([[1, 2], [3, 4]])
    images, _ = rotate4(corners, normalize=PIXELS)
    assert images[:, 0].int().tolist() == [
        [[1, 2], [3, 4]],
        [[2, 4], [1, 3]],
        [[4, 3], [2, 1]],
        [[3, 1], [4, 2]],
    ]


@pytest.mark.parametrize("normalize", [IMAGENET, CIFAR10], ids=["imagenet", "cifar10"])
def test_values_are_normalised_once(normalize: Normalize) -> None:
    crops = noise(9)
    images, _ = rotate4(crops, normalize=normalize)
    x = crops.double().permute(0, 3, 1, 2)
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (normalize.mean, normalize.std)
    )
    for k in range(4):
        expected = torch.rot90((x - mean) / std, k, (2, 3))
        assert (images[3 * k : 3 * k + 3].double() - expected).abs().max() < 1e-6


def plain(crops: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Reference: the views by their definition, one operation at a time over the whole batch."""
    mean, std = (torch.tensor(v, dtype=torch.float32) for v in (IMAGENET.mean, IMAGENET.std))
    upright = ((crops.float() - mean) * (1.0 / std)).to(dtype)
    turned = torch.cat([torch.rot90(upright, k, (1, 2)) for k in range(4)])
    return turned.permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [*SIZES, 3, 4, 15, 16, 17, 50])
def test_every_bit_is_that_of_the_definition(size: int, dtype: torch.dtype) -> None:
    crops = noise(size, batch=5)
    images, _ = rotate4(crops, normalize=IMAGENET, dtype=dtype)
    assert torch.equal(images, plain(crops, dtype))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_share_a_batch(threads: int) -> None:
    before = torch.get_num_threads()
    crops = noise(20, batch=5)
    try:
        torch.set_num_threads(threads)
        images, _ = rotate4(crops, normalize=IMAGENET, dtype=torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(images, plain(crops, torch.bfloat16))


_FORKED = """
import os
import torch
from pipelines.device.rotate import rotate4
from pipelines.spec import IMAGENET

torch.set_num_threads(2)
crops = torch.full((4, 8, 8, 3), 7, dtype=torch.uint8)
expected, _ = rotate4(crops, normalize=IMAGENET)  # starts the parent's threads
child = os.fork()
found, _ = rotate4(crops, normalize=IMAGENET)
assert torch.equal(found, expected)
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.timeout(120)
def test_a_forked_process_has_threads_of_its_own() -> None:
    subprocess.run([sys.executable, "-c", _FORKED], check=True, timeout=100)


@pytest.mark.parametrize("views", [1, 4])
def test_a_buffer_of_the_caller_is_filled_and_returned(views: int) -> None:
    crops = noise(6)
    shape = (3 * views, 3, 6, 6)
    out = torch.full(shape, float("nan")).contiguous(memory_format=torch.channels_last)
    dtype = torch.float32
    images = normalize_views(crops, views=views, normalize=IMAGENET, dtype=dtype, out=out)
    assert images is out and torch.equal(out, plain(crops, dtype)[: len(out)])
    for wrong in (out.contiguous(), out[1:], out.half(), out.to("meta")):
        with pytest.raises(ValueError, match="out must be torch"):
            normalize_views(crops, views=views, normalize=IMAGENET, dtype=dtype, out=wrong)


def some_regions() -> tuple[Regions, torch.Tensor]:
    """Regions of noise with gaps between them, and each region resized on its own."""
    side, shapes, flips = 12, [(20, 30), (1, 1), (12, 12), (7, 40), (5, 3)], [0, 1, 1, 0, 1]
    draw, pieces, offsets, crops, end = np.random.default_rng(0), [], [], [], 0
    for (height, width), flip in zip(shapes, flips, strict=True):
        pieces += [draw.integers(0, 256, 5, np.uint8)]
        region = draw.integers(0, 256, (height, width, 3), np.uint8)
        offsets.append(end + 5)
        pieces.append(region.reshape(-1))
        end += 5 + region.size
        crop = np.empty((side, side, 3), np.uint8)
        scratch = np.empty(scratch_size(height, width, side), np.uint32)
        resize_into(region, (0, 0, height, width), crop, bool(flip), scratch)
        crops.append(torch.from_numpy(crop))
    columns = (
        torch.tensor(offsets),
        torch.tensor(shapes, dtype=torch.int32),
        torch.tensor(flips) > 0,
    )
    return Regions(torch.from_numpy(np.concatenate(pieces)), *columns, side), torch.stack(crops)


def test_regions_are_resized_then_turned() -> None:
    regions, crops = some_regions()
    images, labels = rotate4(regions, normalize=IMAGENET, dtype=torch.float16)
    assert torch.equal(images, plain(crops, torch.float16))
    assert torch.equal(labels, torch.arange(4).repeat_interleave(5))


@pytest.mark.parametrize("place", [0, 4])
def test_regions_outside_their_pixels_are_refused(place: int) -> None:
    regions, _ = some_regions()
    for offset in (-1, len(regions.pixels) - 5 * 3 * 3 + 1):
        regions.offsets[place] = offset
        with pytest.raises(ValueError, match=f"region {place} of .* does not lie inside"):
            rotate4(regions, normalize=IMAGENET)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounding_of_single(dtype: torch.dtype) -> None:
    crops = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    single, _ = rotate4(crops, normalize=IMAGENET)
    half, _ = rotate4(crops, normalize=IMAGENET, dtype=dtype)
    assert half.dtype == dtype and torch.equal(half, single.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("views", [1, 4])
def test_layout_and_ownership(views: int, dtype: torch.dtype) -> None:
    crops = noise(6)
    images = normalize_views(crops, views=views, normalize=IMAGENET, dtype=dtype)
    assert images.is_contiguous(memory_format=torch.channels_last)
    kept = images.clone()
    crops.zero_()  # the engine's next batch
    assert torch.equal(images, kept)


def test_the_first_rows_are_the_plain_batch() -> None:
    crops = noise(7, batch=5)
    images, labels = rotate4(crops, normalize=IMAGENET)
    plain = normalize_views(crops, views=1, normalize=IMAGENET, dtype=torch.float32)
    assert torch.equal(images[:5], plain) and not labels[:5].any()
    assert torch.equal(labels, torch.arange(4).repeat_interleave(5))


def test_flip_then_rotate_keeps_the_label_and_the_reverse_does_not() -> None:
    """The order is crop, flip, rotate, because flipping last would turn 90 degrees into 270."""
    crops = noise(8, batch=1)
    flipped, labels = rotate4(crops.flip(2), normalize=PIXELS)
    straight, _ = rotate4(crops, normalize=PIXELS)
    for k in labels.tolist():
        unturned = torch.rot90(flipped[k], -k, (1, 2))
        assert torch.equal(unturned, straight[0].flip(2))  # one image, mirrored, for every label
        mirrored_late = straight[k].flip(2)
        assert torch.equal(mirrored_late, flipped[-k % 4])


@pytest.mark.parametrize(
    ("crops", "message"),
    [
        (torch.zeros(2, 4, 5, 3, dtype=torch.uint8), "crops must be square to be rotated, got 4x5"),
        (torch.zeros(2, 4, 4, 3), "expected uint8"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "expected uint8"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), "expected uint8"),
    ],
    ids=["not-square", "float", "channels-first", "no-batch"],
)
def test_other_shapes_are_refused(crops: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotate4(crops, normalize=IMAGENET)
