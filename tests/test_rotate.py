"""The four rotations, against Pillow and torch, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.rotate import normalize_views, rotate4, rotation_labels
from pipelines.spec import CIFAR10, IMAGENET, Normalize

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
        picture = Image.fromarray(crops[row % 3].cpu().numpy())
        turn = TURNS[label]
        turned = picture if turn is None else picture.transpose(turn)
        assert turned.tobytes() == picture.rotate(90 * label).tobytes()
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


def test_directions_on_a_picture_that_one_can_read() -> None:
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
    assert torch.equal(labels, rotation_labels(5, device=torch.device("cpu")))


def test_flip_then_rotate_keeps_the_label_and_the_reverse_does_not() -> None:
    """Why the order is crop, flip, rotate: flipping last would turn 90 degrees into 270."""
    crops = noise(8, batch=1)
    flipped, labels = rotate4(crops.flip(2), normalize=PIXELS)
    straight, _ = rotate4(crops, normalize=PIXELS)
    for k in labels.tolist():
        unturned = torch.rot90(flipped[k], -k, (1, 2))
        assert torch.equal(unturned, straight[0].flip(2))  # one picture, mirrored, for every label
        mirrored_late = straight[k].flip(2)
        assert torch.equal(mirrored_late, flipped[-k % 4])


@pytest.mark.parametrize(
    ("crops", "message"),
    [
        (torch.zeros(2, 4, 5, 3, dtype=torch.uint8), "crops must be square to be turned, got 4x5"),
        (torch.zeros(2, 4, 4, 3), "expected uint8"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "expected uint8"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), "expected uint8"),
    ],
    ids=["not-square", "float", "channels-first", "no-batch"],
)
def test_other_shapes_are_refused(crops: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotate4(crops, normalize=IMAGENET)
