"""Encoded images with chosen headers: EXIF orientation, false sizes, compression bombs."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

from PIL import Image


def encode(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    """The bytes of an image file."""
    out = BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def exif(orientation: int) -> bytes:
    """An EXIF block that holds only this orientation."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def frame_at(data: bytes) -> int:
    """Offset of the start-of-frame marker."""
    return next(data.index(bytes((0xFF, c))) for c in (0xC0, 0xC2) if bytes((0xFF, c)) in data)


def with_size(data: bytes, *, height: int, width: int) -> bytes:
    """The same stream with another size in its header."""
    at = frame_at(data) + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def png_of(width: int, height: int) -> bytes:
    """A valid grey PNG whose pixels compress to almost nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    rows = zlib.compress(bytes(1 << 16))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
