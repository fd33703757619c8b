"""The benchmark programs run, and what they write can be read. Their numbers are not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(110)

PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "loaders.py"
FIELDS = {
    "benchmark": str, "engine": str, "variant": str, "images_per_s": float, "views_per_s": float,
    "cpu_seconds_per_1k_images": float, "first_batch_seconds": float, "median": float,
    "min": float, "max": float, "repeats": int, "device": str, "versions": dict,
}  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_loaders_writes_a_row_for_each_engine(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    done = run(
        *("--engines", "folder", "synthetic", "--size", "8", "--batch-size", "16"),
        *("--repeats", "2", "--seconds", "0.05", "--device", "cpu", "--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["engine"] for row in rows] == ["folder", "synthetic"]
    for row in rows:
        assert {name: type(value) for name, value in row.items()} == FIELDS
        assert 0 < row["min"] <= row["median"] == row["images_per_s"] <= row["max"]
        assert row["versions"]["torch"].startswith("2.")
    assert done.stdout == ""
    assert "images/s" in done.stderr and "synthetic" in done.stderr


def test_loaders_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    done = run(str(tmp_path / "absent.beton"), "--engines", "folder", "--device", "cpu")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "absent.beton" in done.stderr
