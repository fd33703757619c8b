"""The four rotations of RotNet (Gidaris et al., ICLR 2018), made on the device after the crop.

Order of operations: crop, flip, rotate. Rotating before the crop would leave black bars that give
the answer away; flipping after it would make 90 and 270 degrees inseparable, because a mirrored
quarter turn is the opposite quarter turn of the mirrored picture.
"""

from __future__ import annotations

import functools

import torch

from pipelines.spec import Normalize, Precision

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@functools.cache
def _constants(normalize: Normalize, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / std, float32 (3,), made once: a host-to-device copy per batch would wait."""
    std = torch.tensor(normalize.std, dtype=torch.float32)
    mean = torch.tensor(normalize.mean, dtype=torch.float32)
    return mean.to(device), (1.0 / std).to(device)


def normalize_views(
    x_NHWC: torch.Tensor, *, views: int, normalize: Normalize, dtype: torch.dtype
) -> torch.Tensor:
    """Uint8 crops to normalised views, rotation-major.

    Each pixel is computed once as (x - mean) * (1 / std) in float32 and rounded to dtype once;
    turning is a pure permutation, so the order of the two does not change a bit.

    Args:
        x_NHWC: uint8 (B, S, S, 3), RGB, on any device.
        views: 1 (as it is) or 4 (0, 90, 180 and 270 degrees counter-clockwise).
        normalize: mean and standard deviation per channel, in units of 0 to 255.
        dtype: float32, bfloat16 or float16.

    Returns:
        (views * B, 3, S, S) in channels_last memory format, on the device of x_NHWC.

    Raises:
        ValueError: x_NHWC is not uint8, not square, or has not three channels.
    """
    if x_NHWC.dtype != torch.uint8 or x_NHWC.dim() != 4 or x_NHWC.shape[3] != 3:
        raise ValueError(f"expected uint8 (B, S, S, 3), got {x_NHWC.dtype} {tuple(x_NHWC.shape)}")
    batch, side, width, _ = x_NHWC.shape
    if side != width:
        raise ValueError(f"crops must be square to be turned, got {side}x{width}")
    mean, scale = _constants(normalize, x_NHWC.device)
    plain = ((x_NHWC.float() - mean) * scale).to(dtype)
    if views == 1:
        return plain.permute(0, 3, 1, 2)
    out = torch.empty((views, batch, side, side, 3), dtype=dtype, device=x_NHWC.device)
    for k in range(views):
        out[k] = torch.rot90(plain, k, (1, 2))
    # NHWC memory seen as NCHW is what torch calls channels_last: no copy.
    return out.flatten(0, 1).permute(0, 3, 1, 2)


def rotation_labels(batch: int, *, device: torch.device) -> torch.Tensor:
    """Labels of rotation-major views: int64 (4 * batch,), k for k * 90 degrees counter-clockwise.

    The direction is that of the paper's code (gidariss/FeatureLearningRotNet, dataloader.py), of
    `torch.rot90` and of PIL; mmselfsup 1.x turns clockwise, which swaps labels 1 and 3.
    """
    return torch.arange(4, device=device).repeat_interleave(batch)


def rotate4(
    x_NHWC: torch.Tensor, *, normalize: Normalize, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The four views of each crop, with their labels, so that the two cannot drift apart.

    Args:
        x_NHWC: uint8 (B, S, S, 3), RGB.
        normalize: mean and standard deviation per channel, in units of 0 to 255.
        dtype: float32, bfloat16 or float16.

    Returns:
        Images (4B, 3, S, S) in channels_last and labels int64 (4B,). Rows are rotation-major: row
        k * B + i is crop i turned by k * 90 degrees counter-clockwise.

    Raises:
        ValueError: as `normalize_views`.
    """
    images = normalize_views(x_NHWC, views=4, normalize=normalize, dtype=dtype)
    return images, rotation_labels(x_NHWC.shape[0], device=x_NHWC.device)
