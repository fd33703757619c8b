"""Decoding and cropping of single images with torchvision.

This is the reference arithmetic, used by the folder engine. Other engines fall back on it for
single samples that their own decoder rejects.
"""

from __future__ import annotations

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from pipelines.arrays import Int32, Uint8
from pipelines.imaging.decode import ImageError, decode_rgb, jpeg_header


def decode(data: bytes | Uint8) -> torch.Tensor:
    """Decode an image to upright RGB pixels.

    Args:
        data: The encoded image, or its bytes as uint8 (bytes,).

    Returns:
        uint8 (3, H, W); the memory layout is (H, W, 3) for JPEG files.

    Raises:
        ImageError: The image cannot be decoded or is too large.
    """
    data = data if isinstance(data, bytes) else data.tobytes()
    # The decoder allocates what the header claims (13 GB for a false one of 80 KB): check first.
    header = jpeg_header(data)
    if header is None or header.components not in (1, 3) or header.precision != 8:
        return torch.from_numpy(decode_rgb(data)).permute(2, 0, 1)
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    # Deprecated since torchvision 0.29 in favour of TorchCodec, which this project does not depend
    # on; torchvision itself has no other decoder.
    try:
        image: torch.Tensor = decode_jpeg(
            buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True
        )
    except RuntimeError as error:
        raise ImageError(str(error).splitlines()[0]) from error
    return image


def crop(image: torch.Tensor, box: Int32, size: int) -> torch.Tensor:
    """Cut a crop box out of an image and resize it with an antialiased bilinear filter.

    Pixels outside the image are black.

    Args:
        image: uint8 (3, H, W).
        box: int32 (5,), top, left, height, width, flip.
        size: Side of the output in pixels.

    Returns:
        uint8 (3, size, size).
    """
    top, left, height, width, flip = (int(v) for v in box)
    # numpy cuts, copies and flips, in (H, W, 3): torch would start a thread team for each of the
    # folder engine's threads.
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
