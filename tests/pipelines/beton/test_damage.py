"""Damaged betons: every mutation is refused with a one-line error, with or without a manifest."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.beton.layout import ALLOC, FIELD, HEADER, metadata_type
from pipelines.beton.manifest import manifest_path
from pipelines.beton.reader import Beton, BetonError, verify
from tests.support.betons import COUNT, make_beton

pytestmark = pytest.mark.timeout(60)

META = HEADER.itemsize + 2 * FIELD.itemsize
ROW = metadata_type(("image", "label")).itemsize


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_beton(tmp_path_factory.mktemp("beton") / "good.beton")


Edit = Callable[[bytearray], Any]


def put(fmt: str, at: Callable[[bytearray], int] | int, value: int) -> Edit:
    """Overwrite a number."""

    def edit(data: bytearray) -> None:
        struct.pack_into(fmt, data, at if isinstance(at, int) else at(data), value)

    return edit


def add(fmt: str, at: Callable[[bytearray], int] | int, value: int) -> Edit:
    """Add to a number."""

    def edit(data: bytearray) -> None:
        place = at if isinstance(at, int) else at(data)
        old = struct.unpack_from(fmt, data, place)[0]
        struct.pack_into(fmt, data, place, (old + value) % (1 << 8 * struct.calcsize(fmt)))

    return edit


def table(data: bytearray, row: int = 3, column: int = 0) -> int:
    return int(struct.unpack_from("<Q", data, 16)[0]) + row * ALLOC.itemsize + 8 * column


def payload(data: bytearray, row: int = 3, offset: int = 0) -> int:
    return int(struct.unpack_from("<Q", data, table(data, row, 1))[0]) + offset


def cut(length: int | Callable[[bytearray], int]) -> Edit:
    def edit(data: bytearray) -> None:
        del data[length if isinstance(length, int) else length(data) :]

    return edit


def swap(column: int) -> Edit:
    """Swap one column between two rows of the allocation table."""

    def edit(data: bytearray) -> None:
        one, two = table(data, 3, column), table(data, 4, column)
        data[one : one + 8], data[two : two + 8] = data[two : two + 8], data[one : one + 8]

    return edit


def fill(size: int, value: int, offset: int = 0) -> Edit:
    def edit(data: bytearray) -> None:
        at = payload(data, 3, offset)
        data[at : at + size] = bytes((value,)) * size

    return edit


def flip(offset: int) -> Edit:
    def edit(data: bytearray) -> None:
        data[payload(data, 3, offset)] ^= 1

    return edit


def image_row(offset: int, row: int = 3) -> int:
    """File offset of the image metadata of one sample."""
    return META + row * ROW + offset


STRUCTURAL: dict[str, Edit] = {
    "empty": cut(0),
    "10 bytes": cut(10),
    "header only": cut(24),
    "cut in the field table": cut(600),
    "cut in the metadata": cut(META + 50),
    "cut in a page": cut(lambda d: payload(d, 9, 5)),
    "cut at the table": cut(lambda d: table(d, 0)),
    "table lacks a row": cut(lambda d: len(d) - ALLOC.itemsize),
    "table lacks 10 bytes": cut(lambda d: len(d) - 10),
    "half a table": cut(lambda d: len(d) - ALLOC.itemsize * COUNT // 2),
    "7 bytes appended": lambda d: d.extend(b"x" * 7),
    "a row appended": lambda d: d.extend(bytes(24)),
    "version 1": put("<H", 0, 1),
    "version 3": put("<H", 0, 3),
    "text": lambda d: d.__setitem__(slice(0, 24), b"hello, this is no beton!"),
    "no fields": put("<H", 2, 0),
    "one field": put("<H", 2, 1),
    "three fields": put("<H", 2, 3),
    "65535 fields": put("<H", 2, 65535),
    "page halved": put("<I", 4, 1 << 20),
    "page doubled": put("<I", 4, 1 << 22),
    "page 0": put("<I", 4, 0),
    "page odd": put("<I", 4, (1 << 21) + 1),
    "no samples": put("<Q", 8, 0),
    "a sample less": put("<Q", 8, COUNT - 1),
    "a sample more": put("<Q", 8, COUNT + 1),
    "100000 samples more": put("<Q", 8, COUNT + 100_000),
    "2**40 samples": put("<Q", 8, 1 << 40),
    "2**63 samples": put("<Q", 8, 1 << 63),
    "table at 0": put("<Q", 16, 0),
    "table 8 later": add("<Q", 16, 8),
    "table a page earlier": add("<Q", 16, -(1 << 21)),
    "table behind the end": put("<Q", 16, 1 << 50),
    "table at the last byte": put("<Q", 16, (1 << 64) - 1),
    "type unknown": put("<B", 24, 7),
    "type of the other field": put("<B", 24, 1),
    "type of label": put("<B", 24 + FIELD.itemsize, 0),
    "name not ASCII": put("<B", 25, 0xC3),
    "name empty": lambda d: d.__setitem__(slice(25, 41), bytes(16)),
    "name unknown": put("<B", 25, ord("j")),
    "the same name twice": lambda d: d.__setitem__(
        slice(24 + FIELD.itemsize, 24 + 2 * FIELD.itemsize), d[24 : 24 + FIELD.itemsize]
    ),
    "mode raw": put("<B", image_row(0), 1),
    "mode 7": put("<B", image_row(0), 7),
    "width 0": put("<H", image_row(1), 0),
    "height 0": put("<H", image_row(3), 0),
    "65535 x 65535": lambda d: d.__setitem__(slice(image_row(1), image_row(5)), b"\xff" * 4),
    "data_ptr + 1": add("<Q", image_row(5), 1),
    "data_ptr 0": put("<Q", image_row(5), 0),
    "data_ptr + 2**40": add("<Q", image_row(5), 1 << 40),
    "data_ptr of the neighbour": lambda d: d.__setitem__(
        slice(image_row(5), image_row(13)), d[image_row(5, 4) : image_row(13, 4)]
    ),
    "label below -1": put("<q", image_row(16), -(1 << 62)),
    "label 2**62": put("<q", image_row(16), 1 << 62),
    "id twice": put("<Q", table, 4),
    "id outside": put("<Q", table, COUNT),
    "id 2**63": put("<Q", table, 1 << 63),
    "ids exchanged": swap(0),
    "places exchanged": swap(1),
    "place + 1": add("<Q", lambda d: table(d, 3, 1), 1),
    "place 0": put("<Q", lambda d: table(d, 3, 1), 0),
    "place in the table": put("<Q", lambda d: table(d, 3, 1), 1 << 22),
    "place 2**64 - 1": put("<Q", lambda d: table(d, 3, 1), (1 << 64) - 1),
    "size 0": put("<Q", lambda d: table(d, 3, 2), 0),
    "size + 1 overlaps": add("<Q", lambda d: table(d, 3, 2), 1),
    "size of the page overlaps": put("<Q", lambda d: table(d, 3, 2), 1 << 21),
    "size 2**63": put("<Q", lambda d: table(d, 3, 2), 1 << 63),
}

DEEP: dict[str, Edit] = {
    "width + 1": add("<H", image_row(1), 1),
    "width halved": put("<H", image_row(1), 15),
    "height x 8": put("<H", image_row(3), 23 * 8),
    "4000 x 4000": lambda d: struct.pack_into("<HH", d, image_row(1), 4000, 4000),
    "size halved": put("<Q", lambda d: table(d, 3, 2), 300),
    "size - 1": add("<Q", lambda d: table(d, 3, 2), -1),
    "SOI lost": fill(2, 0),
    "all zero": fill(500, 0),
    "all ones": fill(500, 0xFF),
    "page zeroed": lambda d: d.__setitem__(slice(1 << 21, 1 << 22), bytes(1 << 21)),
}

ONLY_CHECKSUM: dict[str, Edit] = {
    "one bit": flip(700),
    "200 bytes zero": fill(200, 0, 660),
    "label in range": put("<q", image_row(16), 1),
    "label one too many": put("<q", image_row(16), 5),
    "label -1": put("<q", image_row(16), -1),
    "field arguments": put("<B", 24 + 500, 1),
    "labels exchanged": lambda d: struct.pack_into("<q", d, image_row(16, 0), 4),
}


def damaged(good: Path, folder: Path, edit: Edit, *, manifest: bool) -> Path:
    data = bytearray(good.read_bytes())
    edit(data)
    assert bytes(data) != good.read_bytes(), "the mutation changed nothing"
    path = folder / "bad.beton"
    path.write_bytes(data)
    if manifest:
        manifest_path(path).write_bytes(manifest_path(good).read_bytes())
    return path


def assert_refused(path: Path, check: Callable[[Path], Any]) -> None:
    with pytest.raises(BetonError) as caught:
        check(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    assert "expected" in text


@pytest.mark.parametrize("name", STRUCTURAL)
def test_structural_damage_is_refused_without_a_manifest(
    good: Path, tmp_path: Path, name: str
) -> None:
    assert_refused(damaged(good, tmp_path, STRUCTURAL[name], manifest=False), Beton.open)


@pytest.mark.parametrize("name", DEEP)
def test_damage_to_samples_is_refused_without_a_manifest(
    good: Path, tmp_path: Path, name: str
) -> None:
    assert_refused(damaged(good, tmp_path, DEEP[name], manifest=False), verify)


@pytest.mark.parametrize("name", [*STRUCTURAL, *DEEP, *ONLY_CHECKSUM])
def test_any_damage_is_refused_with_a_manifest(good: Path, tmp_path: Path, name: str) -> None:
    edit = {**STRUCTURAL, **DEEP, **ONLY_CHECKSUM}[name]
    assert_refused(damaged(good, tmp_path, edit, manifest=True), verify)


def test_there_are_enough_mutations() -> None:
    assert len(STRUCTURAL) + len(DEEP) + len(ONLY_CHECKSUM) >= 77


def test_random_bytes_never_crash(good: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    clean = good.read_bytes()
    end = len(clean) - COUNT * ALLOC.itemsize
    for _ in range(200):
        data = bytearray(clean)
        for _ in range(3):
            at = int(rng.integers(0, META + COUNT * ROW + COUNT * ALLOC.itemsize))
            data[at if at < META + COUNT * ROW else end + at - META - COUNT * ROW] ^= 1 << int(
                rng.integers(8)
            )
        path = tmp_path / "bad.beton"
        path.write_bytes(data)
        manifest_path(path).write_bytes(manifest_path(good).read_bytes())
        with pytest.raises(BetonError):
            verify(path)
