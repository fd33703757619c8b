"""Conversion: what is stored, what is left out, and that every failure leaves nothing behind."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from pipelines.beton.manifest import Manifest, manifest_path
from pipelines.beton.reader import Beton, verify
from pipelines.beton.writer import BetonWriter
from pipelines.conversion import workers as worker_processes
from pipelines.conversion.convert import ConversionError, write_beton
from pipelines.datasets.images import MemoryImages
from pipelines.datasets.index import SampleIndex
from pipelines.durable import exclusive
from pipelines.imaging.decode import decode_rgb
from tests.pipelines.jpeg.test_markers import encode, exif, frame_at, make_image, png_of, with_size

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "to_beton.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}  # The tests need no installation.


def convert(folder: Path, files: dict[str, bytes], **options: object) -> Manifest:
    """Write the files into one class folder and convert it to `folder`/out.beton."""
    (folder / "data/c").mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / "data/c" / name).write_bytes(data)
    index = SampleIndex.from_folder(folder / "data")
    options = {"workers": 1, "restart_markers": False, **options}
    return write_beton(index, folder / "out.beton", **options)  # type: ignore[arg-type]


def stored(path: Path) -> list[bytes]:
    with Beton.open(path) as beton:
        return [beton.payload(i).tobytes() for i in range(len(beton))]


def rejected(folder: Path, kind: str = "quarantine") -> dict[str, str]:
    lines = (folder / f"out.beton.{kind}.jsonl").read_text().splitlines()
    return {(line := json.loads(text))["path"]: line["reason"] for text in lines}


def in_memory(
    count: int, read: Callable[[int], npt.NDArray[np.uint8]] | None = None
) -> MemoryImages:
    def noise(i: int) -> npt.NDArray[np.uint8]:
        return np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)

    return MemoryImages(read or noise, np.zeros(count, np.int64), ("c",))


def assert_nothing_left(folder: Path, *, but: tuple[str, ...] = ()) -> None:
    """No output, no temporary or lock file, no child process."""
    left = {p.name for p in folder.iterdir() if p.name.startswith("out.beton")}
    assert left == set(but)
    assert multiprocessing.active_children() == []


def test_plain_jpegs_pass_unchanged(tmp_path: Path) -> None:
    files = {
        "a.jpg": encode(make_image()),
        "b.jpg": encode(make_image(), progressive=True),
        "c.jpg": encode(make_image(mode="L")),
        "d.jpg": encode(make_image(64, 64), restart_marker_rows=1),
        "e.jpg": encode(make_image(1, 1)),
        "f.jpg": encode(make_image(), exif=exif(1)),
    }
    manifest = convert(tmp_path, files)
    assert stored(tmp_path / "out.beton") == list(files.values())
    assert (manifest.passed, manifest.reencoded, manifest.quarantined) == (6, {}, 0)
    assert manifest.classes == ("c",)


def test_bytes_behind_the_end_are_dropped(tmp_path: Path) -> None:
    data = encode(make_image())
    assert convert(tmp_path, {"a.jpg": data + bytes(5000)}).passed == 1
    assert stored(tmp_path / "out.beton") == [data]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_images_are_stored_upright(tmp_path: Path, orientation: int) -> None:
    data = encode(make_image(), exif=exif(orientation), quality=95)
    assert convert(tmp_path, {"a.jpg": data}).reencoded == {"orientation": 1}
    upright = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data))))
    found = Image.open(BytesIO(stored(tmp_path / "out.beton")[0]))
    assert found.getexif().get(0x0112) is None
    assert np.abs(np.asarray(found).astype(int) - upright).mean() < 2


GREY16 = Image.fromarray(np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32))

ODD: dict[str, tuple[bytes, str]] = {
    "cmyk": (encode(make_image(mode="CMYK")), "cmyk"),
    "palette PNG": (encode(make_image(mode="P"), "PNG"), "format"),
    "RGBA PNG": (encode(make_image(mode="RGBA"), "PNG"), "format"),
    "LA PNG": (encode(make_image(mode="LA"), "PNG"), "format"),
    "16-bit PNG": (encode(GREY16, "PNG"), "format"),
    "WebP": (encode(make_image(), "WEBP", lossless=True), "format"),
    "BMP": (encode(make_image(), "BMP"), "format"),
    "GIF": (encode(make_image(mode="P"), "GIF"), "format"),
    "TIFF": (encode(make_image(), "TIFF"), "format"),
    "stray bytes": (
        (data := encode(make_image()))[: frame_at(data)] + b"abc" + data[frame_at(data) :],
        "cleaned",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_engines_read_differently_is_encoded_anew(tmp_path: Path, name: str) -> None:
    data, reason = ODD[name]
    assert convert(tmp_path, {"x.jpg": data}).reencoded == {reason: 1}
    out = decode_rgb(stored(tmp_path / "out.beton")[0])
    assert np.abs(out.astype(int) - decode_rgb(data)).mean() < 4  # Dithering is hard to encode.
    verify(tmp_path / "out.beton")


JPEG = encode(make_image(200, 200))

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
    assert stored(tmp_path / "out.beton") == [JPEG]


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


def test_output_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    outputs = []
    for workers in (1, 2, 3):
        path = tmp_path / f"{workers}.beton"
        write_beton(in_memory(700), path, workers=workers)
        outputs.append(path.read_bytes() + manifest_path(path).read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


def test_workers_leave_the_garbage_of_the_parent_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finalisers wait for threads that a worker does not have: it must not run them."""
    parent = os.getpid()

    class Trap:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            if os.getpid() != parent:
                threading.Event().wait()

    def read(_i: int) -> npt.NDArray[np.uint8]:
        if os.getpid() != parent:
            gc.collect()
        return np.zeros((16, 16, 3), np.uint8)

    monkeypatch.setattr(worker_processes, "_PATIENCE_SECONDS", 20.0)
    gc.disable()
    try:
        Trap()
        write_beton(in_memory(4, read), tmp_path / "out.beton", workers=1)
    finally:
        gc.enable()


def test_silent_workers_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getpid()

    def stuck(_i: int) -> npt.NDArray[np.uint8]:
        if os.getpid() != parent:
            threading.Event().wait()
        return np.zeros((16, 16, 3), np.uint8)

    monkeypatch.setattr(worker_processes, "_PATIENCE_SECONDS", 0.5)
    with pytest.raises(ConversionError, match=r"no worker has answered for 0\.5 s"):
        write_beton(in_memory(4, stuck), tmp_path / "out.beton", workers=1)
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
    manifest = convert(tmp_path, {"a.jpg": encode(make_image(*size))}, **options)
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


def test_a_killed_worker_ends_the_run(tmp_path: Path) -> None:
    at_work = tmp_path / "pid"

    def slow(_: int) -> npt.NDArray[np.uint8]:
        if multiprocessing.parent_process() is not None:
            if not at_work.exists():
                at_work.with_suffix(f".{os.getpid()}").write_text(str(os.getpid()))
                at_work.with_suffix(f".{os.getpid()}").rename(at_work)
            time.sleep(0.05)
        return np.zeros((8, 8, 3), np.uint8)

    def kill() -> None:
        while not at_work.exists():
            time.sleep(0.05)
        os.kill(int(at_work.read_text()), signal.SIGKILL)
        at_work.unlink()

    timer = threading.Thread(target=kill, daemon=True)
    timer.start()
    start = time.monotonic()
    with pytest.raises(ConversionError, match="died by signal 9"):
        write_beton(in_memory(5000, slow), tmp_path / "out.beton", workers=2)
    assert time.monotonic() - start < 10
    timer.join()
    assert_nothing_left(tmp_path)


def test_a_failing_source_ends_the_run_with_its_traceback(tmp_path: Path) -> None:
    def broken(i: int) -> npt.NDArray[np.uint8]:
        if i == 40 and multiprocessing.parent_process() is not None:
            raise RuntimeError("no such thing")
        return np.zeros((8, 8, 3), np.uint8)

    with pytest.raises(ConversionError, match="no such thing"):
        write_beton(in_memory(100, broken), tmp_path / "out.beton", workers=2)
    assert_nothing_left(tmp_path)


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

    # Bytes that reach the disk damaged are caught by reading them back.
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
        with pytest.raises(ConversionError, match="GB free"):
            convert(tmp_path, {}, overwrite=True)
    assert_nothing_left(tmp_path, but=names)
    assert [(tmp_path / name).read_bytes() for name in names] == old
    convert(tmp_path, {}, overwrite=True)
    assert verify(tmp_path / "out.beton").samples == 1


def test_a_reader_keeps_its_file_while_it_is_rebuilt(tmp_path: Path) -> None:
    convert(tmp_path, {"a.jpg": JPEG})
    with Beton.open(tmp_path / "out.beton") as beton:
        convert(tmp_path, {"a.jpg": encode(make_image())}, overwrite=True)
        assert beton.payload(0).tobytes() == JPEG


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    with exclusive(tmp_path / "out.beton"):
        with pytest.raises(ConversionError, match="another process"):
            convert(tmp_path, {"a.jpg": JPEG})
    convert(tmp_path, {"a.jpg": JPEG})


def script(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, **options
    )


def test_script_converts_and_verifies(tmp_path: Path) -> None:
    out = tmp_path / "out.beton"
    done = script("--input", "digits", "--split", "val", "--output", out)
    assert done.returncode == 0, done.stderr
    assert "360 samples, 10 classes" in done.stdout
    again = script("--input", "digits", "--output", out)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1) and "--overwrite" in again.stderr
    checked = script("--verify", out)
    assert (checked.returncode, checked.stdout.count("\n")) == (0, 1) and "360" in checked.stdout
    data = bytearray(out.read_bytes())
    data[(1 << 21) + 700] ^= 1
    out.write_bytes(data)
    broken = script("--verify", out)
    assert (broken.returncode, broken.stderr.count("\n")) == (2, 1)
    assert all(word in broken.stderr for word in (str(out), "sample 0", "expected", "found"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--input", "missing", "--output", "o.beton"], "no folder"),
        (["--input", "digits"], "give --input and --output"),
        (["--verify", "missing.beton"], "no such file"),
        (["--verify", "."], "plain file"),
        (["--input", "digits", "--output", "/dev/null/o.beton"], "/dev/null"),
        (["--input", "digits", "--output", "o.beton", "--quality", "0"], "quality"),
        (["--input", "torchvision:Nope", "--output", "o.beton"], "expected one of"),
    ],
)
def test_script_tells_mistakes_in_one_line(tmp_path: Path, args: list[str], words: str) -> None:
    done = script(*args, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("to_beton:")]
    assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def limit_files() -> None:
    """Let no file grow beyond 3 MiB, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))


def test_script_on_a_full_disk(tmp_path: Path) -> None:
    done = script("--input", "digits", "--output", tmp_path / "out.beton", preexec_fn=limit_files)
    assert done.returncode == 2 and "too large" in done.stderr, done.stderr
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_script_killed_half_way_can_be_run_again(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "data").mkdir()
    noisy = encode(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8))
    )
    for i in range(600):
        (tmp_path / f"data/{i}.jpg").write_bytes(noisy)
    args = ("--input", tmp_path / "data", "--output", tmp_path / "out.beton", "--workers", 1)
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    deadline = time.monotonic() + 30
    with subprocess.Popen(command, start_new_session=True, env=ENVIRONMENT) as run:
        temporary = tmp_path / f"out.beton.tmp.{run.pid}"
        while not temporary.exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert temporary.exists()
        run.send_signal(how)
        run.wait(timeout=10)
    assert not (tmp_path / "out.beton").exists()
    while time.monotonic() < deadline:  # The worker notices that its parent is gone.
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("a worker outlived its parent")
    if how == signal.SIGTERM:
        assert_nothing_left(tmp_path)
    done = script(*args)
    assert done.returncode == 0, done.stderr
    assert_nothing_left(tmp_path, but=("out.beton", "out.beton.json", "out.beton.segments"))
