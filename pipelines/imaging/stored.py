"""What files of pictures and masks say, without decoding pictures."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.imaging.decode import FORMATS, ImageError, check_size
from pipelines.jpeg.markers import JpegError, read_header

_HEAD = 1 << 16  # bytes of a file in which most headers lie
_ORIENTATION = 0x0112


def read_numbers(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """The numbers in a PNG file of one 8-bit channel: a palette's entries, or levels of grey.

    Returns:
        uint8 (h, w).

    Raises:
        ImageError: there is no such file, or it is no such picture; it begins with the path.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            check_size(*image.size)
            if image.mode not in ("P", "L"):
                raise ImageError(f"pixels of mode {image.mode}, expected a palette or 8-bit grey")
            return np.array(image)
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ImageError(f"{os.fspath(path)}: {reason(error)}") from error


def picture_size(path: str) -> tuple[int, int]:
    """Height and width of a picture, upright, by its header alone.

    Raises:
        ImageError: no picture.
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
