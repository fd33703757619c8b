"""One picture: encoded bytes to upright pixels to a crop, with torchvision. The reference engine's
arithmetic, and what other engines fall back on for a single sample that their decoder refused."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from pipelines.augment import Int32
from pipelines.decode import ImageError, decode_rgb
from pipelines.jpeg import MAX_PIXELS, JpegError, read_header

Pixels = npt.NDArray[np.uint8]


def decode(data: bytes | Pixels) -> torch.Tensor:
    """Encoded picture to upright RGB pixels.

    Returns:
        uint8 (3, H, W); memory is laid out as (H, W, 3) for JPEG files.

    Raises:
        ImageError: not decodable, or too large.
    """
    head = bytes(data[:2])
    if head != b"\xff\xd8":
        return torch.from_numpy(decode_rgb(bytes(data))).permute(2, 0, 1)
    try:
        header = read_header(data if isinstance(data, bytes) else data.tobytes())
    except JpegError as error:
        raise ImageError(str(error)) from error
    # The decoder allocates what the header claims, 13 GB from a lie of 80 KB: look first.
    if header.height * header.width > MAX_PIXELS:
        raise ImageError(f"{header.width}x{header.height} pixels are over the limit {MAX_PIXELS}")
    if header.components not in (1, 3) or header.precision != 8:
        return torch.from_numpy(decode_rgb(bytes(data))).permute(2, 0, 1)
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        picture: torch.Tensor = decode_jpeg(
            buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True
        )
    except RuntimeError as error:
        raise ImageError(str(error).splitlines()[0]) from error
    return picture


def crop(picture: torch.Tensor, box: Int32, size: int) -> torch.Tensor:
    """Cut a box out of a picture, black outside, resized with an antialiased bilinear filter.

    Args:
        picture: uint8 (3, H, W).
        box: int32 (5,): top, left, height, width, flip.
        size: side of the output in pixels.

    Returns:
        uint8 (3, size, size).
    """
    top, left, height, width, flip = (int(v) for v in box)
    region: torch.Tensor = F.crop(picture, top, left, height, width)
    if (height, width) != (size, size):
        region = F.resize(region, [size, size], antialias=True)
    return region.flip(2) if flip else region
