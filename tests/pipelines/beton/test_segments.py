"""The side file of segment offsets: written with its beton, refused for any other."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipelines.beton.manifest import Manifest, manifest_path
from pipelines.beton.reader import Beton, BetonError, verify
from pipelines.beton.segments import HEADER, RECORD, SegmentsWriter, segments_path
from pipelines.conversion.convert import ConversionError, write_beton
from pipelines.datasets.images import MemoryImages
from pipelines.imaging.decode import decode_rgb
from tests.support.betons import assert_nothing_left, rejected, stored_files
from tests.support.encoded_images import encode, exif
from tests.support.images import gradient_image, noise_image, photographs
from tests.support.stock_ffcv import read_with_stock_ffcv

pytestmark = pytest.mark.timeout(120)

IMAGES = (
    encode(photographs()[0], quality=90),
    encode(gradient_image(), progressive=True),
    encode(noise_image(90, 77).convert("L")),
    encode(gradient_image(60, 90), exif=exif(6)),
    encode(noise_image(90, 77), "PNG"),
    encode(photographs()[1], quality=80, subsampling=0, restart_marker_rows=1),
)


def make(path: Path, **options: object) -> Manifest:
    source = MemoryImages(lambda i: IMAGES[i], np.arange(len(IMAGES)), tuple("abcdef"))
    options = {"workers": 1, "overwrite": True, **options}
    return write_beton(source, path, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("segments") / "out.beton"
    make(path)
    return path


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    for name in ("out.beton", "out.beton.json", "out.beton.segments"):
        shutil.copy(good.with_name(name), tmp_path / name)
    return tmp_path / "out.beton"


def test_every_sample_has_its_record(good: Path) -> None:
    with Beton.open(good) as beton:
        assert beton.segments is not None and beton.manifest is not None
        marks = beton.manifest.restarts
        assert marks is not None and (marks.cut, marks.uncut) == (5, {"progressive": 1})
        records = beton.segments.records
        assert (records["interval"] > 0).tolist() == [True, False, True, True, True, True]
        for i in np.flatnonzero(records["interval"]):
            lengths, record = beton.segments.of(int(i)), records[i]
            assert len(lengths) == int(record["rows"]) * record["columns"] // record["interval"]
            total = int(record["head"]) + int(lengths.sum()) + 2 * len(lengths)
            assert total == beton.sizes[i]
        kept = [i for i in range(6) if i not in (3, 4)]
        for i in kept:
            np.testing.assert_array_equal(
                decode_rgb(beton.payload(i).tobytes()), decode_rgb(IMAGES[i])
            )
        added = sum(int(beton.sizes[i]) - len(IMAGES[i]) for i in kept)
        assert 0 < added <= marks.added < added + 2000
    assert verify(good).checksums


def test_without_markers_there_is_no_side_file_and_bytes_pass(tmp_path: Path) -> None:
    made = make(tmp_path / "out.beton", restart_markers=False)
    assert made.restarts is None and not segments_path(tmp_path / "out.beton").exists()
    assert stored_files(tmp_path / "out.beton")[0] == IMAGES[0]


def test_rebuilding_without_markers_removes_the_side_file(copy: Path) -> None:
    make(copy, restart_markers=False)
    assert not segments_path(copy).exists()
    with Beton.open(copy) as beton:
        assert beton.segments is None
    make(copy)
    assert verify(copy).samples == 6


def test_stale_temporary_files_are_swept_and_failures_leave_none(tmp_path: Path) -> None:
    stale = tmp_path / ".out.beton.123.tmp"
    stale.mkdir()
    (stale / "out.beton.segments").write_bytes(b"x")
    bad = MemoryImages(lambda _: IMAGES[0][:-9], np.zeros(3, np.int64), ("c",))
    with pytest.raises(ConversionError, match="budget"):
        write_beton(bad, tmp_path / "out.beton", workers=1, budget=1)
    assert_nothing_left(tmp_path, but=("out.beton.failed.jsonl",))
    assert len(rejected(tmp_path, "failed")) == 2


def test_a_side_file_that_the_disk_damages_is_never_published(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = segments_path(copy).read_bytes()
    finish = SegmentsWriter.finish

    def damage(self: SegmentsWriter, fingerprint: str) -> None:
        finish(self, fingerprint)
        with self.path.open("r+b") as file:
            file.seek(HEADER.itemsize + 5)
            file.write(b"\x7f")

    with monkeypatch.context() as patch:
        patch.setattr(SegmentsWriter, "finish", damage)
        with pytest.raises(ConversionError, match="read back differs"):
            make(copy)
    assert segments_path(copy).read_bytes() == before
    names = ("out.beton", "out.beton.json", "out.beton.segments")
    assert_nothing_left(copy.parent, but=names)


def test_a_run_that_dies_between_its_renames_is_noticed(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old side file and the old manifest are refused for the new beton."""
    other = MemoryImages(lambda _: IMAGES[0], np.zeros(6, np.int64), ("c",))

    replace = os.replace

    def die(source: Path, target: Path) -> None:
        if target != copy:
            raise OSError(5, "power is gone")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(ConversionError, match="power"):
            write_beton(other, copy, workers=1, overwrite=True)
    with pytest.raises(BetonError, match="belongs to another file"):
        Beton.open(copy)
    manifest_path(copy).unlink()
    with pytest.raises(BetonError, match=r"segments: byte 16: expected the side file of beton"):
        Beton.open(copy)


def test_a_lost_side_file_is_an_error_where_the_manifest_speaks_of_it(copy: Path) -> None:
    segments_path(copy).unlink()
    with pytest.raises(BetonError, match="found none"):
        Beton.open(copy)


def record_at(data: bytes, sample: int, key: str) -> int:
    fields = RECORD.fields
    assert fields is not None
    return len(data) - (6 - sample) * RECORD.itemsize + int(fields[key][1])


@pytest.mark.parametrize(
    ("what", "value", "words"),
    [
        (0, b"X", "version 1"),
        (8, b"\x02", "version 1"),
        (16, b"!", "the side file of beton"),
        (32, b"\x07", "6 samples"),
        (40, b"\x01\x00", "lengths and 6 records"),
        ((0, "interval"), b"\x07\x00", "divides"),
        ((0, "columns"), b"\x00\x00", "a grid"),
        ((0, "rows"), b"\x01\x00", "follow one another"),
        ((0, "mcu_width"), b"\x05", "mcu_width 8, 16 or 32"),
        ((0, "mcu_width"), b"\x20", "expected MCUs for"),
        ((0, "frame"), b"\xff\xff\xff\xff", "before the scan"),
        ((2, "first"), b"\x00", "follow one another"),
        ((2, "head"), b"\xff\xff\xff\x00", "expected a head below"),
    ],
)
def test_damaged_structure_is_refused(
    copy: Path, what: int | tuple[int, str], value: bytes, words: str
) -> None:
    path = segments_path(copy)
    data = bytearray(path.read_bytes())
    at = what if isinstance(what, int) else record_at(data, *what)
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(BetonError, match=words) as caught:
        Beton.open(copy)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_cut_off_side_files_are_refused(copy: Path) -> None:
    data = segments_path(copy).read_bytes()
    for length in (0, 10, HEADER.itemsize, len(data) - 1):
        segments_path(copy).write_bytes(data[:length])
        with pytest.raises(BetonError, match="expected"):
            Beton.open(copy)


def test_verify_compares_every_length_and_place_with_the_bytes(copy: Path) -> None:
    path, data = segments_path(copy), segments_path(copy).read_bytes()
    for at in (HEADER.itemsize, HEADER.itemsize + 40, record_at(data, 0, "head")):
        damaged = bytearray(data)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(BetonError, match="sample 0: expected"):
            verify(copy)
    path.write_bytes(data)
    verify(copy)


@pytest.mark.slow
def test_stock_ffcv_sees_the_same_pixels_with_and_without_markers(tmp_path: Path) -> None:
    streams = [encode(noise_image(96, 160), quality=q) for q in (50, 75, 90)]
    plain, marked = tmp_path / "plain.beton", tmp_path / "marked.beton"
    for path, marks in ((plain, False), (marked, True)):
        source = MemoryImages(lambda i: streams[i], np.arange(3), tuple("abc"))
        write_beton(source, path, workers=1, restart_markers=marks)
    with Beton.open(marked) as beton:
        assert beton.segments is not None and (beton.segments.records["interval"] > 0).all()
    without, with_markers = read_with_stock_ffcv(tmp_path, (plain, True), (marked, True))
    assert without[0].shape == (3, 96, 160, 3) and without[0].std() > 10
    np.testing.assert_array_equal(without[0], with_markers[0])
