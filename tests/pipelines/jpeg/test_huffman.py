"""Walking Huffman codes without decoding pixels: accepted streams and detected damage."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from pipelines.conversion.encode import Options, PreparedImage, prepare
from pipelines.imaging.decode import inspect
from pipelines.jpeg.markers import ImageError, read_header
from pipelines.jpeg.scan import Scan, walk_scan
from tests.support.encoded_images import encode
from tests.support.images import gradient_image, noise_image, photographs

pytestmark = pytest.mark.timeout(120)

NOISE = encode(noise_image(64, 80), quality=90)
MARKED = encode(noise_image(64, 80), quality=90, restart_marker_blocks=4)
PHOTOGRAPH = encode(photographs()[1], quality=85)


def walk(data: bytes) -> Scan:
    scan = walk_scan(data, read_header(data))
    assert scan is not None
    return scan


def coded(data: bytes) -> int:
    return read_header(data).coded


def test_dc_differences_add_up_to_the_mean_of_each_block() -> None:
    """Independent DC coefficients: the mean of Pillow's pixels over the quantisation table."""
    with Image.open(BytesIO(encode(photographs()[0].convert("L"), quality=100))) as image:
        table = image.quantization[0]  # type: ignore[attr-defined]
        grey = np.asarray(image)[:424, :640].astype(float)
    scan = walk(encode(photographs()[0].convert("L"), quality=100))
    assert (scan.rows, scan.columns, scan.spare) == (54, 80, 0)
    dc = np.cumsum(scan.blocks["value"]).reshape(54, 80)[:53]
    means = grey.reshape(53, 8, 80, 8).mean(axis=(1, 3))
    assert np.abs(dc * table[0] / 8 + 128 - means).max() < 1.0


def test_extra_bytes_before_the_end_are_counted_and_such_images_cleaned() -> None:
    data = NOISE[:-2] + b"\x12\x34\x56" + NOISE[-2:]
    assert walk(data).spare == 3
    made = prepare(data, options=Options())
    assert made.kind == "cleaned"


def edit(at: Callable[[bytes], int], value: bytes, *, base: bytes = NOISE) -> bytes:
    place = at(base)
    return base[:place] + value + base[place + len(value) :]


def remove(data: bytes, start: int, count: int) -> bytes:
    return data[:start] + data[start + count :]


MIDDLE = coded(NOISE) + (len(NOISE) - coded(NOISE)) // 2
MARKER = MARKED.index(b"\xff\xd2", coded(MARKED))

DAMAGE: dict[str, tuple[bytes, str]] = {
    "no code is all ones": (
        edit(coded, b"\xff\x00\xff\x00\xff\x00\xff\x00"),
        "no table|end too early|more than 64|out of range",
    ),
    "cut out of the middle": (remove(NOISE, MIDDLE, 400), "damaged"),
    "end marker too early": (NOISE[:MIDDLE] + b"\xff\xd9", "end too early|no table|more than 64"),
    "a restart marker removed": (remove(MARKED, MARKER, 2), "restart marker"),
    "a restart marker of another number": (
        edit(lambda _: MARKER, b"\xff\xd5", base=MARKED),
        "restart marker",
    ),
    "a restart marker that nobody asked for": (
        NOISE[:MIDDLE] + b"\xff\xd0" + NOISE[MIDDLE:],
        "restart marker",
    ),
    "taller than its data": (
        edit(lambda data: read_header(data).frame_at + 5, b"\x02\x00"),
        "end too early",
    ),
    "without a quantization table": (
        edit(lambda data: data.index(b"\xff\xdb"), b"\xff\xee"),
        "no quantization table 0",
    ),
    "no end": (NOISE[:-2], "truncated"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(name: str) -> None:
    data, words = DAMAGE[name]
    with pytest.raises(ImageError, match=words):
        walk(data)


def test_walk_finds_damage_that_libjpeg_ignores() -> None:
    """libjpeg fills missing data with grey, and Pillow does not report it."""
    data, _ = DAMAGE["end marker too early"]
    assert inspect(data, read_header(data)) is None


@pytest.mark.parametrize("base", [NOISE, MARKED, PHOTOGRAPH, encode(gradient_image(40, 40))])
def test_bit_flips_never_crash_the_walk(base: bytes) -> None:
    """No crash, no read outside the buffer; most bit flips in the coded data are detected."""
    draw = np.random.default_rng(len(base))
    found = 0
    for _ in range(300):
        data = bytearray(base)
        at = int(draw.integers(coded(base), len(base) - 2))
        data[at] ^= 1 << int(draw.integers(8))
        try:
            made = walk_scan(bytes(data), read_header(bytes(data)))
            found += made is None or made.spare > 0
        except ImageError:
            found += 1
    assert found > 30
    for _ in range(300):
        data = bytearray(base)
        for at in draw.integers(2, coded(base), 3):
            data[at] = draw.integers(256)
        try:
            walk_scan(bytes(data), read_header(bytes(data)))
        except ImageError:
            pass


def test_streams_that_the_walk_does_not_know_are_left_to_the_decoder() -> None:
    """Without Huffman tables, some decoders use those of the standard."""
    data = NOISE
    while b"\xff\xc4" in data[: coded(data)]:
        at = data.index(b"\xff\xc4")
        data = remove(data, at, 2 + int.from_bytes(data[at + 2 : at + 4], "big"))
    assert walk_scan(data, read_header(data)) is None
    progressive = encode(gradient_image(), progressive=True)
    made = prepare(progressive, options=Options())
    assert made == PreparedImage(progressive, 24, 40, "passed", uncut="progressive")
