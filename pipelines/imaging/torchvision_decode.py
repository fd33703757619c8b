"""One image: encoded bytes to upright pixels to a crop, with torchvision. The reference engine's
arithmetic, and what other engines fall back on for a single sample that their decoder refused."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from pipelines.arrays import Int32
from pipelines.imaging.decode import ImageError, decode_rgb
from pipelines.jpeg.markers import MAX_PIXELS, JpegError, read_header

Pixels = npt.NDArray[np.uint8]


def decode(data: bytes | Pixels) -> torch.Tensor:
    """Encoded image to upright RGB pixels.

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
    # Deprecated since torchvision 0.29, in favour of TorchCodec, which is no dependency of this
    # project; torchvision itself has no other decoder.
    try:
        image: torch.Tensor = decode_jpeg(
            buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True
        )
    except RuntimeError as error:
        raise ImageError(str(error).splitlines()[0]) from error
    return image


def crop(image: torch.Tensor, box: Int32, size: int) -> torch.Tensor:
    """Cut a box out of an image, black outside, resized with an antialiased bilinear filter.

    Args:
        image: uint8 (3, H, W).
        box: int32 (5,): top, left, height, width, flip.
        size: side of the output in pixels.

    Returns:
        uint8 (3, size, size).
    """
    top, left, height, width, flip = (int(v) for v in box)
    # Cut, copied and flipped by numpy, in (H, W, 3): torch would start a team of threads for each
    # of the folder engine's own.
    pixels = image.permute(1, 2, 0).numpy()
    region = np.zeros((height, width, 3), np.uint8)
    y0, y1 = max(top, 0), min(top + height, pixels.shape[0])
    x0, x1 = max(left, 0), min(left + width, pixels.shape[1])
    if y1 > y0 and x1 > x0:
        region[y0 - top : y1 - top, x0 - left : x1 - left] = pixels[y0:y1, x0:x1]
    square: torch.Tensor = torch.from_numpy(region).permute(2, 0, 1)
    if (height, width) != (size, size):
        square = F.resize(square[None], [size, size], antialias=True)[0]
    if flip:
        square = torch.from_numpy(square.permute(1, 2, 0).numpy()[:, ::-1].copy()).permute(2, 0, 1)
    return square
