"""The four rotations of RotNet (Gidaris et al., ICLR 2018), computed on the device after the crop.

Order of operations: crop, flip, rotate. Rotating before the crop would leave black bars that reveal
the label. Flipping after the rotation would make 90 and 270 degrees inseparable, because a mirrored
quarter turn is the opposite quarter turn of the mirrored image.
"""

from __future__ import annotations

import torch

from pipelines.batch import DTYPES, Regions
from pipelines.spec import Normalize


def normalize_views(
    images: torch.Tensor | Regions,
    *,
    views: int,
    normalize: Normalize,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn uint8 crops into normalised views, rotation-major, in one pass over memory.

    A pixel becomes (x - mean) * (1 / std) in float32, rounded to dtype once; rotation is a pure
    permutation. Regions are first resized with the antialiased bilinear filter of
    `pipelines.imaging.resize`, and flipped where their `flips` are set.

    Args:
        images: uint8 (B, S, S, 3), RGB, or regions to be resized to S; on the CPU or a CUDA device.
        views: 1 (unrotated) or 4 (0, 90, 180 and 270 degrees counter-clockwise).
        normalize: Mean and standard deviation per channel, in units of 0 to 255.
        dtype: float32, bfloat16 or float16.
        out: Output tensor of the shape, dtype, layout and device of the result; None allocates one.
            On a CPU a new buffer costs more than the work itself.

    Returns:
        (views * B, 3, S, S) in channels_last memory format, on the device of the images.

    Raises:
        ValueError: The images are not uint8, not square or do not have three channels; a region
            lies outside its pixels (checked on a CPU only); dtype, views, device or out is not
            supported.
    """
    if dtype not in DTYPES.values() or views not in (1, 4):
        raise ValueError(
            f"cannot make {views} views in {dtype}: expected 1 or 4, in fp32, bf16 or fp16"
        )
    if isinstance(images, Regions):
        batch, side, device = len(images.offsets), images.side, images.pixels.device
    else:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
            shape = tuple(images.shape)
            raise ValueError(f"expected uint8 (B, S, S, 3), got {images.dtype} {shape}")
        batch, side, width = images.shape[:3]
        if side != width:
            raise ValueError(f"crops must be square to be rotated, got {side}x{width}")
        device, images = images.device, images.contiguous()
    shape = (views * batch, 3, side, side)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    elif (
        out.shape != shape
        or out.dtype != dtype
        or out.device != device
        or not out.is_contiguous(memory_format=torch.channels_last)
    ):
        raise ValueError(
            f"out must be {dtype} {shape} in channels_last on {device}, got {out.dtype} "
            f"{tuple(out.shape)}, strides {out.stride()}, on {out.device}"
        )
    # channels_last is NHWC memory seen as NCHW: no copy.
    memory = out.permute(0, 2, 3, 1).view(views, batch, side, side, 3)
    if batch == 0:
        return out
    # Imported on demand: each brings a compiler, and a run needs only one of them.
    if device.type == "cuda":
        from pipelines.device import rotate_triton

        rotate_triton.write_views(images, memory, normalize=normalize)
    elif device.type == "cpu":
        from pipelines.device import rotate_cpu

        rotate_cpu.write_views(images, memory, normalize=normalize)
    else:
        raise ValueError(f"views can be made on the CPU or on a CUDA device, not on {device}")
    return out


def rotate4(
    images: torch.Tensor | Regions,
    *,
    normalize: Normalize,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the four views of each crop together with their labels.

    The direction is that of the paper's code (gidariss/FeatureLearningRotNet, dataloader.py), of
    `torch.rot90` and of PIL. mmselfsup 1.x rotates clockwise, which swaps labels 1 and 3.

    Args:
        images: uint8 (B, S, S, 3), RGB, or regions to be resized to S.
        normalize: Mean and standard deviation per channel, in units of 0 to 255.
        dtype: float32, bfloat16 or float16.
        out: Output tensor for the images, as in `normalize_views`; None allocates one.

    Returns:
        Images (4B, 3, S, S) in channels_last and labels int64 (4B,). Rows are rotation-major: row
        k * B + i is crop i rotated by k * 90 degrees counter-clockwise.

    Raises:
        ValueError: As `normalize_views`.
    """
    rotated = normalize_views(images, views=4, normalize=normalize, dtype=dtype, out=out)
    labels = torch.arange(4, device=rotated.device).repeat_interleave(len(rotated) // 4)
    return rotated, labels
