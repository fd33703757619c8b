"""Worker processes of a conversion: same output for any number, crashes, silence."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipelines.beton.manifest import manifest_path
from pipelines.conversion import workers as worker_processes
from pipelines.conversion.convert import ConversionError, write_beton
from pipelines.datasets.images import MemoryImages
from tests.support.betons import assert_nothing_left, rejected
from tests.support.encoded_images import encode
from tests.support.images import gradient_image

pytestmark = pytest.mark.timeout(120)


def in_memory(
    count: int, read: Callable[[int], npt.NDArray[np.uint8]] | None = None
) -> MemoryImages:
    def noise(i: int) -> npt.NDArray[np.uint8]:
        return np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)

    return MemoryImages(read or noise, np.zeros(count, np.int64), ("c",))


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
    """Finalisers may wait for threads that a forked worker does not have: it must not run them."""
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

    monkeypatch.setattr(worker_processes, "_ANSWER_TIMEOUT_SECONDS", 20.0)
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

    monkeypatch.setattr(worker_processes, "_ANSWER_TIMEOUT_SECONDS", 0.5)
    with pytest.raises(ConversionError, match=r"no worker has answered for 0\.5 s"):
        write_beton(in_memory(4, stuck), tmp_path / "out.beton", workers=1)
    assert_nothing_left(tmp_path)


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


def test_a_truncated_image_that_pillow_reads_late_is_quarantined(tmp_path: Path) -> None:
    """As other libraries return it: opened, but not yet decoded."""
    whole = encode(gradient_image())

    def get(i: int) -> Image.Image:
        return Image.open(BytesIO(whole[:-100] if i == 7 else whole))

    source = MemoryImages(get, np.zeros(30, np.int64), ("c",))
    made = write_beton(source, tmp_path / "out.beton", workers=1)
    assert (made.samples, made.quarantined) == (29, 1)
    assert list(rejected(tmp_path)) == ["#7"] and "is truncated" in rejected(tmp_path)["#7"]
    assert source.size(7) == 0
