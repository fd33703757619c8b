"""Beton files: FFCV reads ours, we read FFCV's, damaged files and manifests are refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.beton.manifest import load_manifest, manifest_path
from pipelines.beton.reader import Beton, BetonError, verify
from pipelines.conversion.convert import write_beton
from pipelines.datasets.images import MemoryImages
from tests.support.betons import COUNT, import_ffcv, make_beton, noise_pixels
from tests.support.stock_ffcv import read_with_stock_ffcv

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_beton(tmp_path_factory.mktemp("beton") / "good.beton")


def test_round_trip(good: Path) -> None:
    with Beton.open(good) as beton:
        assert len(beton) == COUNT and beton.classes == tuple("abcde")
        assert beton.labels.tolist() == [i % 5 for i in range(COUNT)]
        assert beton.heights.tolist() == [20 + i for i in range(COUNT)]
        assert set(beton.widths.tolist()) == {30} and not beton.modes.any()
        for i in range(COUNT):
            pixels = np.asarray(Image.open(BytesIO(beton.payload(i).tobytes())))
            assert np.abs(pixels.astype(int) - noise_pixels(i)).mean() < 12
        assert np.shares_memory(beton.payload(3), beton.data)
        for bad in (-1, COUNT):
            with pytest.raises(IndexError):
                beton.payload(bad)
    found = verify(good)
    assert (found.samples, found.jpegs, found.labelled, found.checksums) == (24, 24, 24, True)


@pytest.mark.slow
def test_stock_ffcv_reads_our_file(tmp_path: Path) -> None:
    count = 12
    source = MemoryImages(lambda i: noise_pixels(i)[:20], np.arange(count) % 3, tuple("xyz"))
    path = tmp_path / "f.beton"
    write_beton(source, path, workers=1)
    for images, labels in read_with_stock_ffcv(tmp_path, (path, True), (path, False)):
        assert labels.tolist() == [i % 3 for i in range(count)]
        with Beton.open(path) as beton:
            for i in range(count):
                ours = np.asarray(Image.open(BytesIO(beton.payload(i).tobytes())))
                # FFCV uses the fast inverse DCT: noise differs slightly, another image by about 80.
                assert np.abs(images[i].astype(int) - ours).mean() < 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", [("image", "label"), ("label", "image"), ("image",)])
@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_files_of_the_stock_writer_open(tmp_path: Path, order: tuple[str, ...], mode: str) -> None:
    import_ffcv()
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode=mode), "label": IntField()}
    samples = [{"image": noise_pixels(i), "label": i + 1} for i in range(9)]
    path = tmp_path / "stock.beton"
    writer = DatasetWriter(str(path), {name: fields[name] for name in order}, num_workers=2)
    writer.from_indexed_dataset([tuple(s[name] for name in order) for s in samples], chunksize=2)
    with Beton.open(path) as beton:
        assert beton.manifest is None and beton.classes == ()
        assert beton.fields == order
        assert beton.heights.tolist() == [20 + i for i in range(9)]
        assert beton.labels.tolist() == [i + 1 if len(order) == 2 else -1 for i in range(9)]
        if mode == "raw":
            np.testing.assert_array_equal(beton.payload(4), noise_pixels(4).ravel())
    assert verify(path).checksums is False


def test_not_a_regular_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        Beton.open(tmp_path / "none.beton")
    with pytest.raises(BetonError, match="expected a regular file"):
        Beton.open(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 9),
        ("version", None),
        ("classes", "abc"),
        ("classes", [1, 2]),
        ("samples", COUNT + 1),
        ("samples", True),
        ("crc32", "AAAA"),
        ("crc32", "!"),
        ("fingerprint", "0" * 16),
        ("reencoded", []),
    ],
)
def test_bad_manifests_are_refused(good: Path, tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "x.beton"
    path.write_bytes(good.read_bytes())
    content = json.loads(manifest_path(good).read_text())
    manifest_path(path).write_text(json.dumps({**content, key: value}))
    with pytest.raises(BetonError, match=r"x\.beton\.json"):
        Beton.open(path)
    for text in ("", "[]", "{", "[" * 100_000):
        manifest_path(path).write_text(text)
        with pytest.raises(BetonError, match=r"x\.beton\.json"):
            Beton.open(path)


def test_manifest_reads_back(good: Path) -> None:
    found = load_manifest(manifest_path(good))
    assert found.dumps() == manifest_path(good).read_text()
    assert found.reencoded == {"array": COUNT} and found.passed == 0
    assert str(good.parent) not in found.dumps()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_readable(
    good: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: refuse(code))
    Beton.open(good).close()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_a_lock_that_fails_for_another_reason_is_an_error(
    good: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: refuse(code))
    with pytest.raises(BetonError, match=f"cannot be locked: {os.strerror(code)}"):
        Beton.open(good)


def refuse(code: int) -> None:
    raise OSError(code, os.strerror(code))


def test_lock_is_shared_and_released(good: Path) -> None:
    with Beton.open(good) as one, Beton.open(good), good.open("rb") as stream:
        with pytest.raises(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert len(one)
    with good.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BetonError, match="another process"):
            Beton.open(good)
    one.close()
    assert one.payload(0)[0] == 0xFF
