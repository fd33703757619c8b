"""scripts/to_beton.py: conversion, verification, errors, interruptions."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.betons import assert_nothing_left
from tests.support.encoded_images import encode

pytestmark = pytest.mark.timeout(120)


ROOT = Path(__file__).parents[3]


SCRIPT = ROOT / "scripts" / "to_beton.py"


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
}  # So that the tests run without an installation.


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
        (["--input", "missing", "--output", "o.beton"], "not a folder"),
        (["--input", "digits"], "give --input and --output"),
        (["--verify", "missing.beton"], "no such file"),
        (["--verify", "."], "regular file"),
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
    """Limit every file to 3 MiB, as if the disk were full."""
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
        temporary = tmp_path / f".out.beton.{run.pid}.tmp/out.beton"
        while not temporary.exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert temporary.exists()
        run.send_signal(how)
        run.wait(timeout=10)
    assert not (tmp_path / "out.beton").exists()
    while time.monotonic() < deadline:  # The worker notices that its parent has died.
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
