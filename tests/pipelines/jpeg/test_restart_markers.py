"""Insertion of restart markers: pixels are unchanged, segments lie where the table says."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from pipelines.beton.segments import find_fault
from pipelines.jpeg.markers import read_header
from pipelines.jpeg.restart_markers import MAX_OVERHEAD, RestartLayout, insert_restart_markers
from pipelines.jpeg.scan import walk_scan
from tests.support.encoded_images import encode, exif
from tests.support.images import gradient_image, noise_image, photographs

pytestmark = pytest.mark.timeout(120)


def cut(data: bytes) -> tuple[bytes, RestartLayout]:
    scan = walk_scan(data, read_header(data))
    assert scan is not None
    found = insert_restart_markers(data, scan)
    assert found is not None
    return found


def pixels(data: bytes) -> npt.NDArray[np.uint8]:
    """As Pillow decodes them, without color conversion."""
    image = Image.open(BytesIO(data))
    image.draft("YCbCr" if image.mode == "RGB" else None, None)
    return np.asarray(image)


def torch_pixels(data: bytes) -> npt.NDArray[np.uint8]:
    """As torchvision decodes them."""
    stream = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    found: npt.NDArray[np.uint8] = decode_jpeg(stream, mode=ImageReadMode.RGB).numpy()
    return found


STREAMS: dict[str, bytes] = {
    **{
        f"{height} x {width}, subsampling {subsampling}": encode(
            noise_image(height, width), subsampling=subsampling, quality=80
        )
        for height, width in ((1, 1), (8, 8), (17, 33), (16, 400), (65, 7), (50, 131))
        for subsampling in (0, 1, 2)
    },
    "grey": encode(noise_image(70, 99).convert("L")),
    "optimised": encode(gradient_image(100, 150), optimize=True),
    "optimised noise": encode(noise_image(90, 150), optimize=True, quality=100),
    "flat": encode(Image.new("RGB", (300, 40), (255, 0, 9)), optimize=True),
    "marked rows": encode(noise_image(90, 150), restart_marker_rows=1),
    "marked odd": encode(noise_image(90, 150), restart_marker_blocks=7),
    "marked single": encode(noise_image(40, 50), restart_marker_blocks=1),
    "marked, finer than cut": encode(photographs()[0], restart_marker_blocks=3),
    "quality 1": encode(noise_image(90, 150), quality=1),
    "application data": encode(
        gradient_image(), exif=exif(1), icc_profile=b"\xff\xd0\xff\xda" * 900, comment=b"\xff\xd9"
    ),
    **{
        f"photograph {n}, {name}": encode(image, **options)
        for n, image in enumerate(photographs())
        for name, options in (
            ("plain", {"quality": 90}),
            ("4:4:4", {"subsampling": 0, "quality": 95}),
            ("4:2:2, optimised", {"subsampling": 1, "optimize": True}),
            ("4:2:0, marked", {"restart_marker_rows": 2}),
        )
    },
}


@pytest.mark.parametrize("name", STREAMS)
def test_pixels_stay_and_segments_are_where_they_should_be(name: str) -> None:
    data = STREAMS[name]
    out, cuts = cut(data)
    np.testing.assert_array_equal(pixels(out), pixels(data))
    np.testing.assert_array_equal(torch_pixels(out), torch_pixels(data))
    header = read_header(out, whole=True)
    assert (header.warning, header.end, header.restart) == (None, len(out), cuts.interval)
    assert header.coded == cuts.head
    size = np.frombuffer(out, ">u2", count=2, offset=cuts.frame)
    assert size.tolist() == [header.height, header.width]
    assert cuts.columns % cuts.interval == 0
    assert len(cuts.lengths) == cuts.rows * cuts.columns // cuts.interval
    assert find_fault(out, cuts.head, cuts.lengths) is None
    with Image.open(BytesIO(data)) as image:
        assert cuts.columns == -(-image.width // cuts.mcu_width)
        assert cuts.rows == -(-image.height // cuts.mcu_height)


def test_each_segment_decodes_alone() -> None:
    """Segments are independent, which cropping relies on.

    An image made of the MCUs of one segment has the same pixels as that part of the whole. Without
    subsampling, so that no pixel depends on its neighbours' colors.
    """
    data = encode(photographs()[0], subsampling=0, quality=90)
    out, cuts = cut(data)
    whole, side = pixels(out), cuts.interval * cuts.mcu_width
    assert cuts.interval < cuts.columns
    starts = cuts.head + np.cumsum(cuts.lengths, dtype=np.int64) - cuts.lengths
    starts += 2 * np.arange(len(starts))
    for k in (0, 1, len(starts) // 2 + 1, len(starts) - 1):
        head = bytearray(out[: cuts.head])
        row, column = divmod(k, cuts.columns // cuts.interval)
        part = whole[row * 8 : row * 8 + 8, column * side : column * side + side]
        head[cuts.frame : cuts.frame + 4] = np.array(part.shape[:2], ">u2").tobytes()
        coded = out[starts[k] : starts[k] + int(cuts.lengths[k])]
        alone = pixels(bytes(head) + coded + b"\xff\xd9")
        np.testing.assert_array_equal(alone, part)


def test_markers_cost_little_and_photographs_are_cut_within_rows() -> None:
    for image in photographs():
        data = encode(image, quality=90)
        out, cuts = cut(data)
        assert len(out) - len(data) <= 1.1 * MAX_OVERHEAD * len(data)
        assert cuts.interval < cuts.columns


def test_markers_can_be_put_in_again() -> None:
    once, cuts = cut(STREAMS["photograph 0, plain"])
    twice, again = cut(once)
    np.testing.assert_array_equal(pixels(twice), pixels(once))
    assert again.interval == cuts.interval
    assert twice == once  # The interval was replaced, not added to.


def test_missing_dc_codes_bring_the_standard_tables() -> None:
    """A bright plane has one DC difference, then only zeros: each segment needs the first one."""
    gradient = np.zeros((64, 1600, 3), np.uint8)
    gradient[:] = np.linspace(0, 255, 1600).astype(np.uint8)[:, None]
    data = encode(Image.fromarray(gradient), optimize=True, quality=98, subsampling=0)
    out, cuts = cut(data)
    assert cuts.rows == 8
    assert out.count(b"\xff\xc4\x00\x1f\x00\x00\x01\x05") == 1
    np.testing.assert_array_equal(pixels(out), pixels(data))


def test_segments_never_exceed_what_a_length_can_say() -> None:
    """A row of noise at full quality is much longer than 65,535 bytes, and 1021 is prime."""
    data = encode(noise_image(8, 8 * 1021), quality=100, subsampling=0)
    out, cuts = cut(data)
    assert len(data) > 2 * 65_535 and (cuts.columns, cuts.interval) == (1021, 1)
    assert find_fault(out, cuts.head, cuts.lengths) is None
    np.testing.assert_array_equal(pixels(out), pixels(data))


def crafted(values: list[int], sizes: list[int], columns: int) -> bytes:
    """A grey image of flat blocks with these DC differences, in codes of 1, 2, 3 ... bits."""
    words = {size: "1" * n + "0" for n, size in enumerate(sizes)}
    bits = ""
    for value in values:
        size = abs(value).bit_length()
        low = value if value >= 0 else value + (1 << size) - 1
        bits += words[size] + (f"{low:0{size}b}" if size else "") + "0"
    bits += "1" * (-len(bits) % 8)
    coded = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")

    def part(kind: int, body: bytes) -> bytes:
        return bytes((0xFF, kind)) + (len(body) + 2).to_bytes(2, "big") + body

    height, width = 8 * len(values) // columns, 8 * columns
    side = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    lengths = bytes([1] * len(sizes) + [0] * (16 - len(sizes)))
    tables = b"\0" + lengths + bytes(sizes) + b"\x10\x01" + bytes(15) + b"\0"
    head = part(0xDB, b"\0" + b"\x01" * 64) + part(0xC0, b"\x08" + side + b"\x01\x01\x11\0")
    scan = part(0xDA, b"\x01\x01\0\0\x3f\0")
    return b"\xff\xd8" + head + part(0xC4, tables) + scan + coded + b"\xff\xd9"


@pytest.mark.parametrize("seed", range(8))
def test_short_codes_may_become_long_ones(seed: int) -> None:
    """DC coefficients that alternate between the ends of their range, in mostly one-bit codes."""
    draw = np.random.default_rng(seed)
    columns, rows = int(draw.choice((1, 7, 16, 64))), 24
    jumps = draw.random(rows * columns) < (1.0 if seed < 3 else draw.random())
    up = np.cumsum(jumps) % 2 == 1
    first = 2047 if seed % 2 else 1023
    values = np.where(jumps, np.where(up, first, -first), 0).tolist()
    often = first.bit_length() if jumps.mean() > 0.5 else 0
    data = crafted(values, [often, first.bit_length() - often], columns)
    out, cuts = cut(data)
    assert find_fault(out, cuts.head, cuts.lengths) is None
    np.testing.assert_array_equal(pixels(out), pixels(data))
    found = walk_scan(out, read_header(out))
    assert found is not None
    # Every segment predicts from zero.
    again = found.blocks["value"].astype(int).reshape(-1, cuts.interval).cumsum(1).ravel()
    np.testing.assert_array_equal(again, np.cumsum(values))


OTHERS: dict[str, Any] = {
    "progressive": encode(gradient_image(), progressive=True),
    "CMYK": encode(gradient_image(mode="CMYK")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_are_left_alone(name: str) -> None:
    assert walk_scan(OTHERS[name], read_header(OTHERS[name])) is None
