"""Image bytes of any supported format to upright RGB pixels, or one sentence why not.

Every engine that decodes without FFCV or DALI, and the converter, decodes here: one rule for
orientation, color and broken files.
"""

from __future__ import annotations

import os
import warnings
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.jpeg.markers import MAX_PIXELS, JpegError, JpegHeader, read_header

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""The only decoders that Pillow may use."""

# Process-wide on purpose: Pillow has no per-call limit, and its own warning must never be the
# only thing between a small file and gigabytes of memory.
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
    Warning,  # Its remarks on metadata, where the caller's filters make errors of them.
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


class ImageError(ValueError):
    """The bytes are no image we can use; the message says why in one line."""


def decode_rgb(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode one image: the first frame, upright, alpha dropped, 16-bit grey scaled to 8 bits.

    Args:
        data: A whole file in one of `FORMATS`, recognised by content.

    Returns:
        (H, W, 3) pixels, contiguous and owned by the caller.

    Raises:
        ImageError: Unknown format, truncated or damaged data, or more than `MAX_PIXELS` pixels.
    """
    header = _jpeg_header(data)
    try:
        with _open(data) as image:
            image.load()
            upright = _upright(image, header)
            if upright.mode.startswith("I;16"):
                return _scale16(np.asarray(upright))
            if upright.mode in ("I", "F"):
                raise ImageError(f"pixels of mode {upright.mode} have no fixed range")
            return np.array(upright.convert("RGB"))
    except ImageError:
        raise
    except _PILLOW_ERRORS as error:
        raise ImageError(_reason(error)) from error


def inspect(data: bytes, *, header: JpegHeader | None = None) -> str | None:
    """Decode all of a JPEG's coefficients, but only an eighth of its size.

    A quarter cheaper than a full decode, and finds the same truncations. Neither finds damage that
    libjpeg papers over with a warning, which Pillow does not pass on: flipped bits, or an end
    marker that comes too early.

    Args:
        data: The JPEG stream.
        header: Its header, where the caller has read it already.

    Returns:
        The reason why the image is unusable, or None.
    """
    try:
        header = header or read_header(data)
        check_size(header.width, header.height)
        with Image.open(BytesIO(data), formats=("JPEG",)) as image:
            if image.size != (header.width, header.height):
                return f"header says {header.width} x {header.height}, decoder {image.size}"
            # Grey drops the work on chroma pixels, not that on chroma's coefficients.
            image.draft("L" if header.components == 3 else None, (1, 1))
            image.load()
    except (JpegError, ImageError) as error:
        return str(error)
    except _PILLOW_ERRORS as error:
        return _reason(error)
    return None


def _open(data: bytes) -> Image.Image:
    """Open without decoding, refusing what is empty, unknown or too large."""
    if not data:
        raise ImageError("the file is empty")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"not a JPEG, PNG, WebP, BMP, TIFF or GIF image: begins with {data[:8]!r}"
        ) from error
    check_size(*image.size)
    return image


def check_size(width: int, height: int) -> None:
    """Raise `ImageError` where there are no pixels or more than `MAX_PIXELS`."""
    if width < 1 or height < 1:
        raise ImageError(f"the image has {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")


def _jpeg_header(data: bytes) -> JpegHeader | None:
    """Header of a JPEG within the size limit; None for other formats."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        header = read_header(data)
    except JpegError as error:
        raise ImageError(str(error)) from error
    check_size(header.width, header.height)
    return header


def _upright(image: Image.Image, header: JpegHeader | None) -> Image.Image:
    """Apply the orientation. JPEG: of the Exif block alone, as DALI does, never of XMP."""
    if header is None:
        return ImageOps.exif_transpose(image)
    turn = _TURN.get(header.orientation)
    return image if turn is None else image.transpose(turn)


def _scale16(grey: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """(H, W) of 0..65535 to (H, W, 3) of 0..255, rounded."""
    scaled = ((grey.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    return np.repeat(scaled[:, :, None], 3, axis=2)


def _reason(error: BaseException) -> str:
    """One line for a Pillow error."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more pixels than the limit of {MAX_PIXELS}"
    text = " ".join(str(error).split())
    return text or type(error).__name__


_HEAD = 1 << 16  # bytes of a file in which most headers lie
_ORIENTATION = 0x0112


def read_numbers(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """The numbers in a PNG file of one 8-bit channel: a palette's entries, or levels of grey.

    Returns:
        uint8 (h, w).

    Raises:
        ImageError: there is no such file, or it is no such image; it begins with the path.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            check_size(*image.size)
            if image.mode not in ("P", "L"):
                raise ImageError(f"pixels of mode {image.mode}, expected a palette or 8-bit grey")
            return np.array(image)
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ImageError(f"{os.fspath(path)}: {reason(error)}") from error


def image_size(path: str) -> tuple[int, int]:
    """Height and width of an image, upright, by its header alone.

    Raises:
        ImageError: no image.
        OSError: not readable.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError("a file that does not exist")
    with open(path, "rb") as file:
        data = file.read(_HEAD)
        try:
            if data[:2] == b"\xff\xd8":
                try:
                    return read_header(data).upright
                except JpegError:  # Long metadata come before the frame's header.
                    return read_header(data + file.read()).upright
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                # Of PNG files, asking for the orientation would decode all of it.
                turn = 1 if image.format == "PNG" else image.getexif().get(_ORIENTATION, 1)
                return (width, height) if turn >= 5 else (height, width)
        except (JpegError, SyntaxError, ValueError, OSError) as error:
            raise ImageError(reason(error)) from error


def reason(error: BaseException) -> str:
    """An error in one line, without the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
