"""JPEG markers and decoding, compared with Pillow."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.imaging.decode import ImageError, decode_rgb, inspect
from pipelines.jpeg.markers import read_header
from tests.support.encoded_images import encode, exif, frame_at, png_of, with_size
from tests.support.images import gradient_image

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(("mode", "components"), [("RGB", 3), ("L", 1), ("CMYK", 4)])
def test_header_is_what_pillow_reads(mode: str, components: int, progressive: bool) -> None:
    data = encode(gradient_image(mode=mode), progressive=progressive)
    header = read_header(data, whole=True)
    assert (header.height, header.width, header.components) == (24, 40, components)
    assert header.progressive is progressive
    assert header.precision == 8 and not header.arithmetic and not header.lossless
    assert header.end == len(data)
    assert header.warning is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_read_and_applied_as_pillow_does(orientation: int) -> None:
    data = encode(gradient_image(), exif=exif(orientation), quality=95)
    header = read_header(data)
    assert header.orientation == orientation
    expected = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data))))
    assert header.upright == expected.shape[:2]
    np.testing.assert_array_equal(decode_rgb(data), expected)


def test_big_endian_exif_and_nonsense_in_it() -> None:
    block = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    data = encode(gradient_image(), exif=b"Exif\0\0" + block)
    assert read_header(data).orientation == 6
    for bad in (b"", b"II*\0\xff\xff\xff\xff", block.replace(b"\0\x06\0", b"\0\x63\0")):
        cut = encode(gradient_image(), exif=b"Exif\0\0" + bad)
        assert read_header(cut).orientation == 1


def test_every_truncation_is_found() -> None:
    data = encode(gradient_image())
    for length in range(len(data)):
        with pytest.raises(ImageError):
            read_header(data[:length], whole=True)


def test_junk_behind_the_end_is_tolerated() -> None:
    data = encode(gradient_image())
    header = read_header(data + b"junk" * 1250, whole=True)
    assert header.end == len(data) and header.warning is None
    assert inspect(data + b"junk", header) is None


def test_oddities_that_strict_decoders_reject_are_noted() -> None:
    data = encode(gradient_image())
    at = frame_at(data)
    assert "stray" in str(read_header(data[:at] + b"abc" + data[at:], whole=True).warning)
    jfif = data.index(b"JFIF\0") + 5
    assert "JFIF" in str(read_header(data[:jfif] + b"\x02" + data[jfif + 1 :], whole=True).warning)
    scan = data.index(b"\xff\xda") + 14
    middle = data[:scan] + b"\xff\xd3" + data[scan:]
    assert "restart" in str(read_header(middle, whole=True).warning)


def test_restart_markers_are_not_odd() -> None:
    data = encode(gradient_image(64, 64), restart_marker_rows=1)
    assert b"\xff\xd0" in data
    assert read_header(data, whole=True).warning is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no JPEG start marker"),
        (b"\xff\xd8", "ends at byte 2"),
        (b"<!DOCTYPE html>", "no JPEG start marker"),
        (b"\xff\xd8\xff\xd9", "without an image"),
        (b"\xff\xd8\xff\xe0\x00\x01", "length 1"),
        (b"\xff\xd8\xff\xe0\xff\xff", "wants 65535 bytes"),
        (b"\xff\xd8\xff\xda\x00\x02", "before any frame"),
        (with_size(encode(gradient_image()), height=0, width=40), "0 x 40 pixels"),
    ],
)
def test_broken_streams_are_refused_with_a_message(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        read_header(data, whole=True)


def test_random_damage_never_raises_anything_else() -> None:
    clean = bytearray(encode(gradient_image(), exif=exif(6)))
    rng = np.random.default_rng(0)
    for _ in range(500):
        data = clean.copy()
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(256)
        for read in (read_header, decode_rgb):
            try:
                read(bytes(data))
            except ImageError:
                pass


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        ("PNG", "RGB"),
        ("PNG", "L"),
        ("PNG", "LA"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("BMP", "RGB"),
        ("TIFF", "RGB"),
        ("GIF", "P"),
    ],
)
def test_lossless_formats_decode_exactly(form: str, mode: str) -> None:
    image = gradient_image(mode=mode)
    reference = Image.open(BytesIO(encode(image, form))).convert("RGB")
    np.testing.assert_array_equal(decode_rgb(encode(image, form)), np.asarray(reference))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    out = decode_rgb(encode(Image.fromarray(grey), "PNG"))
    np.testing.assert_array_equal(out[:, :, 0], np.rint(grey / 257).astype(np.uint8))
    assert out.shape == (4, 256, 3)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"<html>hello</html>", "not a JPEG"),
        (encode(gradient_image())[:-40], "end marker"),
        (encode(gradient_image(), "PNG")[:-60], "."),
        (png_of(15_000, 15_000), "limit"),
        (png_of(9_600, 10_000), "."),
        (with_size(encode(gradient_image()), height=65_500, width=65_500), "limit"),
        (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "no fixed range"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG"),
    ],
)
def test_unusable_files_are_refused_with_a_message(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        decode_rgb(data) if "end marker" not in words else _strict(data)


def _strict(data: bytes) -> None:
    reason = inspect(data, read_header(data))
    assert reason is not None and "truncated" in reason
    raise ImageError(f"end marker: {reason}")
