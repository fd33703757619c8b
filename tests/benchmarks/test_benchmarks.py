"""The benchmark programs run and write readable results. Their numbers are not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import doctor
import pytest
import run_all
import torch

from contestants import stages
from contestants.stages import Stage, StageOptions
from data.photographs import Containers, containers
from harness import results, timing
from harness.runner import ContestantError, ContestantProcess
from tests.support import processes

HERE = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.timeout(200)

FIELDS = {
    "benchmark": str, "name": str, "variant": str, "unit": str, "median": float, "min": float,
    "max": float, "repeats": int, "order": str, "device": str, "cpu": str, "cores": int,
    "versions": dict,
}  # fmt: skip
IMAGE_FIELDS = {
    "views_per_s": float, "cpu_seconds_per_1k_images": float, "images_per_cpu_second": float,
    "window_seconds": float, "threads": int,
}  # fmt: skip
COUNT = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Containers:
    """A few small photographs in all containers."""
    return containers(None, tmp_path_factory.mktemp("made"), count=COUNT, small_side=160)


def run(folder: Path, program: str, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a program."""
    files = [folder / f"{program}.{stream}" for stream in ("stdout", "stderr")]
    words = [*map(str, arguments)]
    path = HERE / f"{program}.py"
    (status,) = processes.run(processes.script, path, words, stdout=files[0], console=files[1])
    said = [file.read_text() for file in files]
    return status, said[0], said[1]


def rows_of(program: str, folder: Path, *arguments: str | Path) -> list[dict[str, Any]]:
    """Rows of a short run, each checked for the common fields."""
    output, plot = folder / "rows.jsonl", folder / "plot.png"
    options: list[str | Path] = ["--output", output, "--plot", plot]
    if program not in ("scale", "splice"):  # These have no --seconds.
        options += ["--seconds", "0.05"]
    status, stdout, stderr = run(folder, program, *arguments, *options)
    assert status == 0, stderr
    assert stdout == "" and "median" in stderr
    assert plot.read_bytes()[:4] == b"\x89PNG"
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for row in rows:
        expected = FIELDS | (IMAGE_FIELDS if "threads" in row else {})
        assert {name: type(row[name]) for name in expected} == expected
        assert row["benchmark"] == program
        assert row["min"] <= row["median"] <= row["max"]
        assert row["versions"]["torch"].startswith("2.")
    return rows


@pytest.mark.ffcv
def test_loaders_writes_a_row_for_each_engine(made: Containers, tmp_path: Path) -> None:
    data = made.small(markers=False)
    rows = rows_of(
        "loaders",
        tmp_path,
        data,
        *("--engines", "folder", "ffcv", "--size", "48", "--batch-size", "8"),
        *("--repeats", "1", "--device", "cpu"),  # Each is a process that imports torch.
    )
    assert [row["name"] for row in rows[:2]] == ["folder", "ffcv"]
    assert [row["name"] for row in rows[2:]] == ["warm start, folder", "warm start, ffcv"]
    for start, loader in zip(rows[2:], rows[:2], strict=True):
        assert start["median"] > 0.3 and start["repeats"] == 1  # Importing torch takes longer.
        assert start["epoch_gap_seconds"] == loader["epoch_gap_seconds"]
        assert start["target"] == 3.0 and start["met"] == (start["median"] <= 3.0)
    for row in rows[:2]:
        assert row["repeats"] == 1 and row["median"] > 0
        assert row["first_batch_seconds"] > 0 and row["rss_mib"] > 50
        assert row["epoch_gap_seconds"] >= 0
        assert row["pixel_difference"] < 4 and abs(row["pixel_bias"]) < 1


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    absent = tmp_path / "absent.beton"
    arguments = ("--engines", "folder", "--device", "cpu")
    status, stdout, stderr = run(tmp_path, "loaders", absent, *arguments)
    assert status == 2 and stdout == ""
    assert stderr.count("\n") == 1 and "absent.beton" in stderr
    status, _, stderr = run(tmp_path, "peers", "--only", "nobody")
    assert status == 2
    assert stderr.count("\n") == 1 and "nobody" in stderr


PEERS = {
    "pil": 1.0,
    "tensor": 1.0,
    "mmselfsup": 1.0,
    # FFCV decodes with a faster, less accurate inverse transform and averages areas.
    "ffcv": 4.0,
    "dali": 1.0,
}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "kinds",
    [
        ("pil", "tensor", "mmselfsup"),
        pytest.param(("ffcv", "ours", "ours, views"), marks=pytest.mark.ffcv),
        pytest.param(("dali",), marks=pytest.mark.dali),
    ],
    ids=" ".join,
)
def test_peers_deliver_the_same_pixels(made: Containers, kinds: tuple[str, ...]) -> None:
    """Each against the reference crop of its own box, on the same files."""
    size, files = 48, made.small_folder()
    common = {"size": size, "batch_size": 8, "workers": 1}
    ours = {"kind": "ours", "engine": "ffcv", "data": made.small(markers=True)}
    configs: dict[str, dict[str, Any]] = {
        kind: {"kind": kind, "data": made.small(markers=False) if kind == "ffcv" else files}
        for kind in PEERS
    }
    configs["ours"] = {**ours, "output": "crops"}
    configs["ours, views"] = {**ours, "output": "rotate4"}
    with ExitStack() as stack:
        # All at once: they spend most of their time on imports.
        contestants = {
            name: stack.enter_context(
                ContestantProcess(name, {**config, **common, "data": str(config["data"])})
            )
            for name in kinds
            for config in [configs[name]]
        }
        for name, process in contestants.items():
            assert process.call("first_batch")["first_batch_seconds"] > 0
            found = process.call("difference", count=COUNT)
            assert found["pixel_difference"] < PEERS.get(name, 4.0), name
            assert abs(found["pixel_bias"]) < 1, name
            assert found["pixel_crops"] == COUNT
            images, seconds, cpu = process.call("window", seconds=0.05)
            assert images > 0 and seconds >= 0.05 and cpu > 0, name
            assert process.call("memory")["rss_mib"] > 50, name


@pytest.mark.ffcv
def test_peers_compares_per_cpu_second(made: Containers, tmp_path: Path) -> None:
    rows = rows_of(
        "peers",
        tmp_path,
        *("--data", made.small_folder(), "--folder", tmp_path / "made", "--small-side", "160"),
        *("--only", "ours ffcv", "torchvision decode_jpeg", "--repeats", "1"),
        *("--size", "48", "--batch-size", "8", "--workers", "1"),
    )
    ours, theirs, ratio = rows
    assert ratio["name"] == "ours ffcv / torchvision decode_jpeg" and ratio["target"] == 2.0
    cost = "cpu_seconds_per_1k_images"
    assert ratio["median"] == pytest.approx(theirs[cost] / ours[cost], rel=0.01)
    assert ratio["met"] == (ratio["median"] >= 2.0)


def test_rotate4_measures_against_copying(tmp_path: Path) -> None:
    rows = rows_of(
        "rotate4",
        tmp_path,
        *("--size", "16", "--batch-size", "2", "--repeats", "1", "--no-compiled"),
        *("--device", "cpu"),
    )
    ours = ["rotate4", "rotate4, same output", "rotate4 of regions"]
    assert [row["name"] for row in rows] == [*ours, "plain torch", "copy of as many bytes"]
    assert rows[-1]["share_of_copy"] == 1.0
    assert all(0 < row["share_of_copy"] for row in rows)


def test_resize_is_compared_with_pillow(tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="cv2 (OpenCV), which comes with ffcv, is not installed")
    arguments = ("--images", "4", "--size", "32", "--repeats", "1")
    ours, area, torchvision, *ratios, difference = rows_of("resize", tmp_path, *arguments)
    assert ours["pixel_difference"] == difference["median"] <= difference["target"] == 1.0
    assert difference["met"]
    assert torchvision["pixel_difference"] < area["pixel_difference"]
    assert [row["name"] for row in ratios] == [f"ours / {r['name']}" for r in (area, torchvision)]


def test_train_step_counts_operations(tmp_path: Path) -> None:
    (row,) = rows_of(
        "train_step",
        tmp_path,
        *("--backbone", "resnet18_tiny", "--size", "16", "--batch-sizes", "2", "--ways", "fp32"),
        *("--repeats", "1", "--device", "cpu"),
    )
    assert row["gigaflop_per_image"] > 0 and row["share_of_matmul"] > 0
    assert row["views_per_s"] == pytest.approx(4 * row["median"], rel=0.05)


def test_end_to_end_names_what_binds(made: Containers, tmp_path: Path) -> None:
    rows = rows_of(
        "end_to_end",
        tmp_path,
        *("--data", made.small(markers=False), "--engine", "folder", "--backbone"),
        *("resnet18_tiny", "--size", "16", "--batch-size", "2", "--repeats", "1"),
        *("--device", "cpu"),
    )
    loader, step, _, efficiency = rows
    assert efficiency["binds"] == ("loader" if loader["median"] < step["median"] else "step")
    assert efficiency["median"] > 0


@pytest.mark.ffcv
def test_convert_counts_bytes_and_workers(made: Containers, tmp_path: Path) -> None:
    rows = rows_of(
        "convert", tmp_path, "--data", made.small_folder(), "--repeats", "1", "--workers", "1"
    )
    plain, header, markers, stock = rows[:4]
    files = sum(p.stat().st_size for p in made.small_folder().rglob("*.jpg"))
    assert plain["payload_bytes"] == plain["source_bytes"] == files
    assert markers["payload_bytes"] > files and markers["bytes_added_percent"] > 0
    assert stock["payload_bytes"] != files
    assert header["payload_bytes"] == plain["payload_bytes"]
    assert all(row["cpu_seconds_per_1k_images"] > 0 for row in rows[:4])
    added = rows[-1]
    assert added["median"] == pytest.approx(markers["bytes_added_percent"], abs=0.001)
    assert added["target"] == 2.0 and added["met"] == (added["median"] <= 2.0)
    assert [row["target"] for row in rows[4:7]] == [4.0, 4.0, None]


@pytest.mark.ffcv
def test_splice_compares_all_bytes(made: Containers, tmp_path: Path) -> None:
    rows = rows_of(
        "splice",
        tmp_path,
        *("--data", made.small(markers=True), "--images", "8", "--crops", "1", "--repeats", "1"),
    )
    whole, spliced, ratio, exact = rows
    cost = "cpu_seconds_per_1k_images"
    assert ratio["median"] == pytest.approx(whole[cost] / spliced[cost], rel=0.02)
    assert 0 < spliced["bytes_kept_share"] < 1
    assert exact["differing_bytes"] == exact["target"] == 0 and exact["met"]
    assert exact["crops"] == 8


def test_scale_measures_each_length(tmp_path: Path) -> None:
    rows = rows_of("scale", tmp_path, "--samples", "300", "1000", "--repeats", "1")
    assert {row["samples"] for row in rows} == {300, 1000}
    assert {row["order"] for row in rows} == {""}  # Runs do not alternate.
    seconds = [row["median"] for row in rows if row["name"] == "open"]
    assert len(seconds) == 2 and all(0 < s < 30 for s in seconds)


def options(**more: Any) -> StageOptions:
    return StageOptions(
        repeats=1, seconds=0.05, engine="folder", backbone="resnet18_tiny", size=8, batch_size=2,
        precision="fp32", device="cpu", **more,
    )  # fmt: skip


def test_doctor_names_a_slow_disk(made: Containers, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(i: int) -> bytes:
        time.sleep(2)  # The injected fault.
        return b"\xff\xd8" + bytes(i)

    # Without this fault any network is slower than a loader on this machine: leave it out.
    monkeypatch.setattr(stages, "_device_stages", lambda *_: [Stage("step", [1e5], "")])
    found = stages.measure_stages(str(made.small(markers=False)), options(), read=slow)
    lines = doctor.diagnose(found, threads=2)
    assert lines[0].startswith("read is the bottleneck") and "disk" in lines[1]


def test_doctor_names_too_few_threads(made: Containers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_device_stages", lambda *_: [Stage("step", [1e6], "")])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    data = str(made.small(markers=False))
    fast = stages.measure_stages(data, options(workers=1), read=lambda i: bytes(i))
    lines = doctor.diagnose(fast, threads=1)
    assert lines[0].startswith("loader is the bottleneck")
    assert any("1 of 8 allowed cores" in line and "cpu_budget" in line for line in lines)


def test_doctor_decodes_with_the_threads_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(10)))
    assert stages.decoding_threads(options()) == 10
    assert (
        stages.decoding_threads(replace(options(), device="cuda")) == 4
    )  # Kernel launches need cores too.
    assert stages.decoding_threads(options(workers=3)) == 3


def test_doctor_names_the_network() -> None:
    pipeline = [Stage("read", [9e3], ""), Stage("loader", [900.0], ""), Stage("step", [90.0], "")]
    lines = doctor.diagnose(pipeline, threads=2)
    assert lines[0].startswith("step is the bottleneck: 90") and "loader, reaches 900" in lines[0]


def test_doctor_runs_every_stage(made: Containers, tmp_path: Path) -> None:
    rows = rows_of(
        "doctor",
        tmp_path,
        *("--data", made.small(markers=False), "--engine", "folder", "--size", "16"),
        *("--batch-size", "2", "--repeats", "1", "--device", "cpu"),
        *("--backbone", "resnet18_tiny"),
    )
    assert {"read", "loader", "rotate", "step"} <= {r["name"] for r in rows if r["in_pipeline"]}


def test_the_time_of_live_workers_counts() -> None:
    """A busy child that has not been waited for yet."""
    code = "import time\nwhile time.process_time() < 0.5: pass\nprint('done', flush=True)\ninput()"
    before = timing.cpu_seconds()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        alive = timing.cpu_seconds() - before
        child.communicate("\n", timeout=20)
    assert 0.45 < alive
    # After wait() it still counts, once.
    assert timing.cpu_seconds() - before < alive + 0.5


def test_a_contestant_that_fails_is_named() -> None:
    config = {"kind": "opened", "data": "/absent.beton"}
    with ContestantProcess("broken", config) as process, pytest.raises(ContestantError) as caught:
        process.call("measure", batch_size=1)
    assert str(caught.value).startswith("broken: ") and "absent.beton" in str(caught.value)


def test_a_program_that_hangs_or_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rows of an earlier run are not reported for this one."""
    good = json.dumps({"name": "fresh", "variant": "", "unit": "x", "median": 2.0, "target": 1.0})
    output = "import sys; out = sys.argv[sys.argv.index('--output') + 1]\n"
    programs = {
        "hangs": "import threading; threading.Event().wait()",
        "fails": "raise SystemExit(3)",
        "works": f"{output}open(out, 'w').write({good!r})",
    }
    for name, code in programs.items():
        (tmp_path / f"{name}.py").write_text(code)
    for name in ("hangs", "fails", "not run"):
        (tmp_path / f"{name}.jsonl").write_text(good.replace("fresh", "stale"))
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    monkeypatch.setattr(run_all, "LIMIT_SECONDS", 3)
    monkeypatch.setattr(run_all, "containers", lambda *_, **__: None)
    monkeypatch.setattr(run_all, "programs", lambda *_: {name: [] for name in programs})
    assert run_all.main(run_all.Arguments(output=tmp_path)) == 1
    said = capfd.readouterr().err
    assert "hangs (timed out after 3 s), fails (exit status 3)" in said
    assert "fresh" in said and "stale" not in said


def test_abba_goes_there_and_back() -> None:
    assert timing.abba("abc", 3) == list("abccbaabc")


def test_a_row_keeps_its_target_also_if_another_value_meets_it() -> None:
    def made(**more: Any) -> dict[str, Any]:
        found = results.row(
            "b", "n", "", [1.0, 2.0, 9.0], unit="x", device=torch.device("cpu"), **more
        )
        return {name: found[name] for name in ("target", "met") if name in found}

    assert made() == {}
    assert made(target=1.5, better="higher") == {"target": 1.5, "met": True}
    assert made(target=None, better="lower") == {"target": None, "met": None}
    assert made(**results.against(9.0, 5.0, "lower")) == {"target": 5.0, "met": False}


def test_programs_start_outside_of_tests() -> None:
    """Without the import paths of pytest and what its process has imported."""
    names = sorted(path.stem for path in HERE.glob("*.py"))
    assert len(names) == 13
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    for command in (["-c", f"import {', '.join(names)}"], [str(HERE / "doctor.py"), "--help"]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=HERE, env=environment, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "--backbone" in done.stdout
