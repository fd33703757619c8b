"""Conversion: stored bytes, quarantined files, and no files left after a failure."""

from __future__ import annotations

import os
import resource
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.beton.manifest import Manifest
from pipelines.beton.reader import Beton, verify
from pipelines.beton.writer import BetonWriter
from pipelines.conversion.convert import ConversionError, write_beton
from pipelines.datasets.images import MemoryImages
from pipelines.datasets.index import SampleIndex
from pipelines.imaging.decode import decode_rgb
from pipelines.storage import locked
from tests.support.betons import assert_nothing_left, rejected, stored_files
from tests.support.encoded_images import encode, exif, frame_at, png_of, with_size
from tests.support.images import gradient_image

pytestmark = pytest.mark.timeout(120)


def convert(folder: Path, files: dict[str, bytes], **options: object) -> Manifest:
    """Write the files into one class folder and convert it to `folder`/out.beton."""
    (folder / "data/c").mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / "data/c" / name).write_bytes(data)
    index = SampleIndex.from_folder(folder / "data")
    options = {"workers": 1, "restart_markers": False, **options}
    return write_beton(index, folder / "out.beton", **options)  # type: ignore[arg-type]


def test_plain_jpegs_pass_unchanged(tmp_path: Path) -> None:
    files = {
        "a.jpg": encode(gradient_image()),
        "b.jpg": encode(gradient_image(), progressive=True),
        "c.jpg": encode(gradient_image(mode="L")),
        "d.jpg": encode(gradient_image(64, 64), restart_marker_rows=1),
        "e.jpg": encode(gradient_image(1, 1)),
        "f.jpg": encode(gradient_image(), exif=exif(1)),
    }
    manifest = convert(tmp_path, files)
    assert stored_files(tmp_path / "out.beton") == list(files.values())
    assert (manifest.passed, manifest.reencoded, manifest.quarantined) == (6, {}, 0)
    assert manifest.classes == ("c",)


def test_bytes_behind_the_end_are_dropped(tmp_path: Path) -> None:
    data = encode(gradient_image())
    assert convert(tmp_path, {"a.jpg": data + bytes(5000)}).passed == 1
    assert stored_files(tmp_path / "out.beton") == [data]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_images_are_stored_upright(tmp_path: Path, orientation: int) -> None:
    data = encode(gradient_image(), exif=exif(orientation), quality=95)
    assert convert(tmp_path, {"a.jpg": data}).reencoded == {"orientation": 1}
    upright = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data))))
    found = Image.open(BytesIO(stored_files(tmp_path / "out.beton")[0]))
    assert found.getexif().get(0x0112) is None
    assert np.abs(np.asarray(found).astype(int) - upright).mean() < 2


GREY16 = Image.fromarray(np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32))

ODD: dict[str, tuple[bytes, str]] = {
    "cmyk": (encode(gradient_image(mode="CMYK")), "cmyk"),
    "palette PNG": (encode(gradient_image(mode="P"), "PNG"), "format"),
    "RGBA PNG": (encode(gradient_image(mode="RGBA"), "PNG"), "format"),
    "LA PNG": (encode(gradient_image(mode="LA"), "PNG"), "format"),
    "16-bit PNG": (encode(GREY16, "PNG"), "format"),
    "WebP": (encode(gradient_image(), "WEBP", lossless=True), "format"),
    "BMP": (encode(gradient_image(), "BMP"), "format"),
    "GIF": (encode(gradient_image(mode="P"), "GIF"), "format"),
    "TIFF": (encode(gradient_image(), "TIFF"), "format"),
    "stray bytes": (
        (data := encode(gradient_image()))[: frame_at(data)] + b"abc" + data[frame_at(data) :],
        "cleaned",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_engines_read_differently_is_encoded_anew(tmp_path: Path, name: str) -> None:
    data, reason = ODD[name]
    assert convert(tmp_path, {"x.jpg": data}).reencoded == {reason: 1}
    out = decode_rgb(stored_files(tmp_path / "out.beton")[0])
    assert np.abs(out.astype(int) - decode_rgb(data)).mean() < 4  # Dithering compresses poorly.
    verify(tmp_path / "out.beton")


JPEG = encode(gradient_image(200, 200))

BAD: dict[str, tuple[bytes, str]] = {
    "half": (JPEG[: len(JPEG) // 2], "truncated"),
    "no end": (JPEG[:-2], "truncated"),
    "40 bytes short": (JPEG[:-40], "truncated"),
    "first 200 bytes": (JPEG[:200], "bytes"),
    "start marker only": (b"\xff\xd8", "ends at byte 2"),
    "empty": (b"", "empty"),
    "HTML": (b"<!DOCTYPE html><html></html>", "not a JPEG"),
    "PNG bomb": (png_of(15_000, 15_000), "limit"),
    "header lie": (with_size(JPEG, height=65_500, width=65_500), "limit"),
    "no height": (with_size(JPEG, height=0, width=200), "0 x 200"),
}


def test_bad_files_are_quarantined_each_with_its_reason(tmp_path: Path) -> None:
    files = {f"{name}.jpg": data for name, (data, _) in BAD.items()}
    (tmp_path / "data/c").mkdir(parents=True)
    (tmp_path / "data/c/folder.jpg").mkdir()
    (tmp_path / "data/c/gone.jpg").symlink_to("nowhere")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    manifest = convert(tmp_path, {**files, "good.jpg": JPEG}, budget=99)
    assert (manifest.samples, manifest.quarantined) == (1, len(BAD) + 2)
    reasons = rejected(tmp_path)
    for name, (_, words) in BAD.items():
        assert words in reasons[f"c/{name}.jpg"], name
    assert "a folder" in reasons["c/folder.jpg"]
    assert "does not exist" in reasons["c/gone.jpg"]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - before < 400_000  # KiB
    assert stored_files(tmp_path / "out.beton") == [JPEG]


def test_one_bad_file_costs_one_sample(tmp_path: Path) -> None:
    files = {f"{i:03}.jpg": JPEG for i in range(300)}
    manifest = convert(tmp_path, {**files, "150.jpg": JPEG[:-9]}, workers=2)
    assert (manifest.samples, manifest.quarantined) == (299, 1)
    assert list(rejected(tmp_path)) == ["c/150.jpg"]


def test_budget_stops_and_leaves_only_the_list(tmp_path: Path) -> None:
    files = {f"{i}.jpg": JPEG[:-9] if i < 3 else JPEG for i in range(9)}
    with pytest.raises(ConversionError, match=r"3 unusable files, the budget is 2.*truncated"):
        convert(tmp_path, files, budget=2)
    assert_nothing_left(tmp_path, but=("out.beton.failed.jsonl",))
    assert len(rejected(tmp_path, "failed")) == 3
    convert(tmp_path, files, budget=3)
    assert not (tmp_path / "out.beton.failed.jsonl").exists()


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no usable image"):
        convert(tmp_path, {"a.jpg": b""})
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({"max_side": 20}, (24, 40), (12, 20)),
        ({"short_side": 12}, (24, 40), (12, 20)),
        ({"max_side": 400}, (5000, 2), (400, 1)),
        ({"max_side": 40}, (24, 40), (24, 40)),
        ({"short_side": 30}, (24, 40), (24, 40)),
    ],
)
def test_larger_images_are_shrunk_and_no_other(
    tmp_path: Path, options: dict[str, int], size: tuple[int, int], expected: tuple[int, int]
) -> None:
    manifest = convert(tmp_path, {"a.jpg": encode(gradient_image(*size))}, **options)
    with Beton.open(tmp_path / "out.beton") as beton:
        assert (beton.heights[0], beton.widths[0]) == expected
    assert manifest.reencoded == ({"resized": 1} if size != expected else {})


@pytest.mark.parametrize(
    "options",
    [
        {"max_side": 10, "short_side": 10},
        {"max_side": 0},
        {"quality": 101},
        {"workers": -1},
        {"budget": -1},
        {"check": "none"},
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        convert(tmp_path, {"a.jpg": JPEG}, **options)


def test_a_sample_longer_than_a_page_gets_larger_pages(tmp_path: Path) -> None:
    big = encode(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), np.uint8)),
        quality=100,
    )
    assert len(big) > 1 << 21
    source = MemoryImages(lambda i: big if i == 601 else JPEG, np.zeros(1100, np.int64), ("c",))
    # Every second sample is probed.
    write_beton(source, tmp_path / "out.beton", workers=1, restart_markers=False)
    with Beton.open(tmp_path / "out.beton") as beton:
        assert beton.page_size == 1 << 22
        assert beton.payload(601).tobytes() == big


def test_failed_rebuilds_leave_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(tmp_path, {"a.jpg": JPEG})
    names = ("out.beton", "out.beton.json")
    old = [(tmp_path / name).read_bytes() for name in names]
    with pytest.raises(ConversionError, match="exists"):
        convert(tmp_path, {})
    bad = {f"{i}.jpg": b"" for i in range(3)}
    with pytest.raises(ConversionError, match="budget"):
        convert(tmp_path, bad, overwrite=True, budget=0)
    (tmp_path / "out.beton.failed.jsonl").unlink()

    # The output is read back, which finds bytes that were damaged on their way to the disk.
    add = BetonWriter.add

    def damage(self: BetonWriter, data: bytes, **known: Any) -> None:
        add(self, data[:20] + bytes((data[20] ^ 1,)) + data[21:], **known)

    with monkeypatch.context() as patch:
        patch.setattr(BetonWriter, "add", damage)
        with pytest.raises(ConversionError, match="CRC-32"):
            convert(tmp_path, {}, overwrite=True)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(ConversionError, match=r"no space for out\.beton in .* MB are free"):
            convert(tmp_path, {}, overwrite=True)
    assert_nothing_left(tmp_path, but=names)
    assert [(tmp_path / name).read_bytes() for name in names] == old
    convert(tmp_path, {}, overwrite=True)
    assert verify(tmp_path / "out.beton").samples == 1


def test_a_reader_keeps_its_file_while_it_is_rebuilt(tmp_path: Path) -> None:
    convert(tmp_path, {"a.jpg": JPEG})
    with Beton.open(tmp_path / "out.beton") as beton:
        convert(tmp_path, {"a.jpg": encode(gradient_image())}, overwrite=True)
        assert beton.payload(0).tobytes() == JPEG


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    with locked(tmp_path / "out.beton", hint=""):
        holder = f"is in use by process {os.getpid()} on "
        with pytest.raises(ConversionError, match=holder):
            convert(tmp_path, {"a.jpg": JPEG})
    convert(tmp_path, {"a.jpg": JPEG})


def test_leftovers_of_killed_conversions_are_swept(tmp_path: Path) -> None:
    """Also those of versions before 0.3, and none of another output."""
    stale = [
        f".out.beton{suffix}.4194305.tmp"
        for suffix in ("", ".json", ".quarantine.jsonl", ".failed.jsonl")
    ]
    stale += ["out.beton.tmp.4194305", "out.beton.tmp.4194305.segments"]
    stale += [f"out.beton{kind}.tmp.4194305" for kind in (".json", ".failed.jsonl")]
    others = [name.replace("out", "out2") for name in stale]
    others += [name.replace("beton", "beton2") for name in stale]
    for name in (*stale, *others):
        (tmp_path / name).touch()
    convert(tmp_path, {"a.jpg": JPEG})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"data", "out.beton", "out.beton.json", *others}


@pytest.mark.parametrize("taken", ["x.beton", "x.beton.segments"])
def test_a_writer_that_cannot_create_both_files_leaves_none_open(
    tmp_path: Path, taken: str
) -> None:
    (tmp_path / taken).mkdir()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=taken):
        BetonWriter(tmp_path / "x.beton", capacity=1, page_size=1 << 21, segments=True)
    assert os.listdir("/proc/self/fd") == before
