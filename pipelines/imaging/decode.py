"""Image decoding with Pillow: bytes of any supported format to upright RGB pixels.

The converter and every engine that decodes without FFCV or DALI use this module, so that there is
one rule for orientation, color and broken files.
"""

from __future__ import annotations

import os
import warnings
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pipelines.arrays import Uint8
from pipelines.jpeg.markers import MAX_PIXELS, JpegHeader, read_header
from pipelines.jpeg.markers import ImageError as ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""The only decoders that Pillow may use."""

# Process-wide on purpose: Pillow has no limit per call. A mere warning must never be the only
# protection against small files that expand to gigabytes of memory.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

# What Pillow raises on damaged files of the formats above.
_PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    Image.DecompressionBombError,
    Warning,  # Warnings about metadata, if the caller's filters turn them into errors.
)

_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_rgb(data: bytes) -> Uint8:
    """Decode one image: the first frame, upright, alpha dropped, 16-bit grey scaled to 8 bits.

    Args:
        data: A whole file in one of `FORMATS`, recognised by content.

    Returns:
        uint8 (H, W, 3), contiguous and owned by the caller.

    Raises:
        ImageError: The format is unknown, the data are truncated or damaged, or the image has more
            than `MAX_PIXELS` pixels.
    """
    header = jpeg_header(data)
    if not data:
        raise ImageError("the file is empty")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size)
            image.load()
            upright = _upright(image, header)
            if upright.mode.startswith("I;16"):  # Grey of 0..65535, scaled to 0..255, rounded.
                grey = (np.asarray(upright).astype(np.uint32) * 255 + 32767) // 65535
                return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
            if upright.mode in ("I", "F"):
                raise ImageError(f"pixels of mode {upright.mode} have no fixed range")
            return np.array(upright.convert("RGB"))
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"not a JPEG, PNG, WebP, BMP, TIFF or GIF image: it begins with {data[:8]!r}"
        ) from error
    except _PILLOW_ERRORS as error:
        raise ImageError(describe_error(error)) from error


def inspect(data: bytes, header: JpegHeader) -> str | None:
    """Check a JPEG: decode all of its coefficients, but only at an eighth of its size.

    This is a quarter cheaper than a full decode and finds the same truncations. Neither finds
    damage for which libjpeg only warns, which Pillow does not report: flipped bits, or an end
    marker that comes too early.

    Args:
        data: The JPEG stream.
        header: Its header, as from `jpeg_header`.

    Returns:
        The reason why the image is unusable, or None.
    """
    try:
        with Image.open(BytesIO(data), formats=("JPEG",)) as image:
            if image.size != (header.width, header.height):
                return f"header says {header.width} x {header.height}, decoder {image.size}"
            # Grey saves the work on chroma pixels, but chroma coefficients are still decoded.
            image.draft("L" if header.components == 3 else None, (1, 1))
            image.load()
    except _PILLOW_ERRORS as error:
        return describe_error(error)
    return None


def check_size(width: int, height: int) -> None:
    """Check the size of an image.

    Raises:
        ImageError: The image has no pixels or more than `MAX_PIXELS`.
    """
    if width < 1 or height < 1:
        raise ImageError(f"the image has {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")


def jpeg_header(data: bytes) -> JpegHeader | None:
    """Read the header of a JPEG; None for other formats.

    Raises:
        ImageError: It is damaged, or the image has more than `MAX_PIXELS` pixels.
    """
    if data[:2] != b"\xff\xd8":
        return None
    header = read_header(data)
    check_size(header.width, header.height)
    return header


def _upright(image: Image.Image, header: JpegHeader | None) -> Image.Image:
    """Apply the orientation. For JPEG only the Exif block counts, as in DALI, never XMP."""
    if header is None:
        return ImageOps.exif_transpose(image)
    turn = _TURN.get(header.orientation)
    return image if turn is None else image.transpose(turn)


_HEADER_BYTES = 1 << 16  # The start of a file; most headers lie within it.


def read_label_png(path: str | os.PathLike[str]) -> Uint8:
    """Read a PNG file of one 8-bit channel: palette indices or grey levels.

    Returns:
        uint8 (H, W).

    Raises:
        ImageError: The file does not exist or is not such an image; the message begins with the
            path.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            check_size(*image.size)
            if image.mode not in ("P", "L"):
                raise ImageError(f"pixels of mode {image.mode}, expected a palette or 8-bit grey")
            return np.array(image)
    except _PILLOW_ERRORS as error:
        raise ImageError(f"{os.fspath(path)}: {describe_error(error)}") from error


def image_size(path: str) -> tuple[int, int]:
    """Read height and width of an upright image from its header alone.

    Raises:
        ImageError: The file is not an image.
        OSError: The file cannot be read.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError("a file that does not exist")
    with open(path, "rb") as file:
        data = file.read(_HEADER_BYTES)
        try:
            if data[:2] == b"\xff\xd8":
                try:
                    return read_header(data).upright
                except ImageError:  # Long metadata precede the frame header.
                    return read_header(data + file.read()).upright
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                # For PNG, asking for the orientation would decode the whole file.
                turn = (
                    1
                    if image.format == "PNG"
                    else image.getexif().get(ExifTags.Base.Orientation, 1)
                )
                return (width, height) if turn >= 5 else (height, width)
        except _PILLOW_ERRORS as error:
            raise ImageError(describe_error(error)) from error


def describe_error(error: BaseException) -> str:
    """Format an error as one line, without the file's name."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more pixels than the limit of {MAX_PIXELS}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
