"""Pretraining end to end on tiny betons: results, resume, signals, several processes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.conversion.convert import write_beton
from pipelines.datasets.images import MemoryImages
from rotpred.models.backbone import build_backbone
from rotpred.training.checkpoint import CheckpointFolder
from rotpred.weights.load import load_backbone
from tests.support import processes
from tests.support.engines import engines
from tests.support.run_outputs import results, saved

pytestmark = [pytest.mark.timeout(200), pytest.mark.slow]

ROOT = Path(__file__).parents[3]
# An engine without compilation and crops of 12 pixels: the run is tested, not the loader.
SMALL = [
    "quickstart", "--backbone", "nin3", "--train.batch-size", "8", "--val.batch-size", "8",
    "--train.crop.size", "12", "--train.crop.padding", "0", "--val.crop.size", "12",
    "--train.engine", "folder", "--val.engine", "folder",
    "--run.device", "cpu", "--run.epochs", "2", "--run.log-every-steps", "2",
    "--run.save-every-steps", "2",
    "--train.timeout", "60", "--train.workers", "1", "--val.workers", "1", "--run.timeout", "60",
]  # fmt: skip
PAIR = [*SMALL, "--train.batch-size", "4"]
"""The same global batch for two processes."""

Console = Callable[[], Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Betons train (50 images) and val (19) with two classes that differ in their bright corner."""
    folder = tmp_path_factory.mktemp("data")
    for name, n in (("train", 50), ("val", 19)):
        generator = np.random.default_rng(n)
        pixels = generator.integers(0, 90, (n, 32, 32, 3), dtype=np.uint8)
        labels = np.arange(n) % 2
        for image, label in zip(pixels, labels, strict=True):
            image[:12, slice(0, 12) if label else slice(20, 32)] += 150
        images = MemoryImages(lambda i, p=pixels: p[i], labels.astype(np.int64), ("left", "right"))
        write_beton(images, folder / f"{name}.beton", workers=1)
    return folder


def options(data: Path, out: Path, *more: str) -> list[str]:
    paths = ["--train.data", str(data / "train.beton"), "--val.data", str(data / "val.beton")]
    return [*more, *paths, "--run.out", str(out)]


def execute(script: str, args: list[str]) -> str:
    """Run a script, check that it succeeds, return its output."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *args],
        capture_output=True,
        text=True,
        timeout=150,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


@pytest.fixture
def console(tmp_path: Path) -> Console:
    """Returns a new path for the output of each run of a test."""
    numbers = itertools.count()
    return lambda: tmp_path / f"console{next(numbers)}"


def pretrain(args: list[str], console: Path, *, status: int = 0, world: int = 1) -> str:
    """Pretrain in separate processes, check their exit statuses, return their output."""
    found = processes.run(processes.pretrain, args, console=console, world=world)
    text = console.read_text()
    assert found == [status] * world, text[-4000:]
    return text


def same_weights(one: Path, other: Path) -> None:
    expected, found = saved(one), saved(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def digest(out: Path) -> object:
    return results(out)["accuracy"]["stream_digest"]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted reference run, by the script itself."""
    out = tmp_path_factory.mktemp("whole") / "run"
    execute("pretrain.py", options(data, out, *SMALL))
    return out


@pytest.fixture(scope="module")
def pair(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two processes."""
    folder = tmp_path_factory.mktemp("pair")
    pretrain(options(data, folder / "run", *PAIR), folder / "console", world=2)
    return folder / "run"


def test_run_folder(whole: Path) -> None:
    row = results(whole)["accuracy"]
    assert row["n"] == 19 * 4
    assert row["benchmark"] == "rotation" and row["recipe"] == "quickstart"
    for name in ("recipe.json", "env.json", "log.jsonl", "backbone.safetensors"):
        assert (whole / name).stat().st_size > 0
    for name in ("views", "confusion", "filters", "curves"):
        assert (whole / "figures" / f"{name}.png").stat().st_size > 2000
    rows = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    checks = [row for row in rows if "val/accuracy" in row]
    assert [row["step"] for row in checks] == [12]
    assert checks[-1]["val/accuracy"] == results(whole)["accuracy"]["value"]
    rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert rows[-1]["images_per_s"] * 4 == pytest.approx(rows[-1]["views_per_s"], rel=1e-3)
    report = load_backbone(build_backbone("nin3"), whole / "backbone.safetensors")
    assert report.sha256 == row["checkpoint_sha256"] and not report.missing


@pytest.mark.parametrize("stop", [3, 6, 11])
def test_killed_run_resumes_bit_for_bit(
    data: Path, whole: Path, tmp_path: Path, console: Console, stop: int
) -> None:
    """SIGKILL inside an epoch, at its end and before the last step: same weights, same samples."""
    out = tmp_path / "run"
    args = options(data, out, *SMALL)
    died = processes.run(
        processes.pretrain_and_signal, args, stop, signal.SIGKILL, console=console()
    )
    assert died == [-signal.SIGKILL]
    latest = CheckpointFolder(out / "checkpoints").latest()
    assert latest is not None and stop - 2 <= latest.step <= stop
    pretrain(args, console())
    same_weights(whole, out)
    same = ("value", "n", "checkpoint_sha256", "stream_digest")
    assert [results(out)["accuracy"][k] for k in same] == [
        results(whole)["accuracy"][k] for k in same
    ]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps))


def test_finished_run_is_left_alone(data: Path, whole: Path, console: Console) -> None:
    before = (whole / "backbone.safetensors").stat().st_mtime_ns
    text = pretrain(options(data, whole, *SMALL), console())
    assert "finished already" in text
    assert (whole / "backbone.safetensors").stat().st_mtime_ns == before


def test_a_run_cut_after_its_last_step_is_completed(
    data: Path, whole: Path, tmp_path: Path, console: Console
) -> None:
    """Results and done.json are written again, and the validation stands once in the log."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "done.json").unlink()
    (out / "results.json").unlink()
    pretrain(options(data, out, *SMALL), console())
    assert results(out)["accuracy"]["value"] == results(whole)["accuracy"]["value"]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "val/accuracy" in row]
    assert len(steps) == len(set(steps)) > 0
    assert (out / "done.json").read_bytes() == (whole / "done.json").read_bytes()


def test_a_score_costs_no_second_checkpoint(whole: Path) -> None:
    """The validated checkpoint has its score and was written once; no older one has a score."""
    latest = CheckpointFolder(whole / "checkpoints").latest()
    assert latest is not None
    record = json.loads(latest.path.with_suffix(".json").read_text())
    value = results(whole)["accuracy"]["value"]
    assert record["score"] == pytest.approx(float(str(value)) / 100)
    assert record["previous"] is None


def test_other_recipe_in_the_same_folder_is_refused(
    data: Path, whole: Path, console: Console
) -> None:
    other = [*SMALL, "--optim.lr", "0.3", "--train.seed", "5"]
    text = pretrain(options(data, whole, *other), console(), status=2)
    assert "belongs to another run" in text and "seed: 0 there, 5 now" in text
    assert "Traceback" not in text


def test_sigterm_writes_a_checkpoint_and_a_status(
    data: Path, whole: Path, tmp_path: Path, console: Console
) -> None:
    out = tmp_path / "run"
    args = options(data, out, *SMALL, "--run.save-every-steps", "1000")
    first = console()
    status = processes.run(processes.pretrain_and_signal, args, 4, signal.SIGTERM, console=first)
    text = first.read_text()
    assert status == [75] and "stopped by a signal after step 4" in text, text[-3000:]
    assert "Traceback" not in text
    pretrain(args, console())
    same_weights(whole, out)


def test_two_processes_meet_the_samples_of_one(whole: Path, pair: Path) -> None:
    """Same global batch: same sample ids and crop boxes; validation counts every image once."""
    assert digest(pair) == digest(whole)
    assert results(pair)["accuracy"]["n"] == 76


def test_resumed_on_another_number_of_processes(
    data: Path, whole: Path, tmp_path: Path, console: Console
) -> None:
    """Started by one process, finished by two: the digest covers every sample and crop box."""
    out = tmp_path / "run"
    pretrain(options(data, out, *SMALL, "--run.max-steps", "5"), console())
    assert digest(out) != digest(whole)
    pretrain(options(data, out, *PAIR), console(), world=2)
    assert digest(out) == digest(whole)


def test_a_signal_to_one_process_stops_all_at_the_same_step(
    data: Path, pair: Path, tmp_path: Path, console: Console
) -> None:
    """The resumed run ends with the same bits as an uninterrupted run of two processes."""
    out = tmp_path / "run"
    args = options(data, out, *PAIR, "--run.save-every-steps", "1000")
    first = console()
    status = processes.run(
        processes.pretrain_and_signal, args, 4, signal.SIGTERM, console=first, world=2
    )
    assert status == [75, 75]
    steps = re.findall(r"stopped by a signal after step (\d+)", first.read_text())
    assert steps == ["4", "4"]
    pretrain(args, console(), world=2)
    same_weights(pair, out)


def test_torchrun_passes_a_signal_on(data: Path, tmp_path: Path) -> None:
    """A job scheduler sends SIGTERM to torchrun, which forwards it to both processes."""
    out = tmp_path / "run"
    endless = [
        *PAIR,
        "--run.epochs",
        "500",
        "--run.log-every-steps",
        "1",
        "--run.save-every-steps",
        "5000",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "scripts" / "pretrain.py")]
    with (tmp_path / "console").open("w") as console:
        job = subprocess.Popen(
            [*command, *options(data, out, *endless)],
            stdout=console,
            stderr=console,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            for _ in range(1200):
                if (out / "log.jsonl").exists() or job.poll() is not None:
                    break
                time.sleep(0.1)
            job.send_signal(signal.SIGTERM)
            status = job.wait(timeout=60)
        finally:
            job.kill()
    text = (tmp_path / "console").read_text()
    assert status != 0
    steps = set(re.findall(r"stopped by a signal after step (\d+)", text))
    assert len(steps) == 1, text[-3000:]
    latest = CheckpointFolder(out / "checkpoints").latest()
    assert latest is not None and latest.step == int(steps.pop())


def test_accumulation_resumes_bit_for_bit(data: Path, tmp_path: Path, console: Console) -> None:
    """Checkpoints are written only between updates, so no pending gradient is lost."""
    more = [*SMALL, "--run.accumulate", "4", "--run.save-every-steps", "1"]
    calm, out = tmp_path / "calm", tmp_path / "run"
    pretrain(options(data, calm, *more), console())
    args = options(data, out, *more)
    died = processes.run(processes.pretrain_and_signal, args, 6, signal.SIGKILL, console=console())
    assert died == [-signal.SIGKILL]
    latest = CheckpointFolder(out / "checkpoints").latest()
    assert latest is not None and latest.step == 4
    pretrain(args, console())
    same_weights(calm, out)


@pytest.mark.parametrize("engine", engines("ffcv", "dali"))
def test_engines_meet_the_same_samples(
    data: Path, whole: Path, tmp_path: Path, console: Console, engine: str
) -> None:
    out = tmp_path / "run"
    pretrain(options(data, out, *SMALL, "--train.engine", engine), console())
    assert digest(out) == digest(whole)


def test_a_loss_that_is_not_finite_stops_all_ranks(
    data: Path, tmp_path: Path, console: Console
) -> None:
    out = tmp_path / "run"
    text = pretrain(options(data, out, *PAIR, "--optim.lr", "1e30"), console(), status=2, world=2)
    assert text.count("was not finite") == 2
    latest = CheckpointFolder(out / "checkpoints").latest()
    if latest is not None:
        assert all(t.isfinite().all() for t in latest.state["model"].values())


def test_accumulation_and_mixed_precision(data: Path, tmp_path: Path, console: Console) -> None:
    out = tmp_path / "run"
    more = ["--run.accumulate", "2", "--run.precision", "bf16", "--run.max-steps", "2"]
    pretrain(options(data, out, *SMALL, *more), console())
    assert results(out)["accuracy"]["n"] == 76


def test_linear_evaluation(data: Path, whole: Path, tmp_path: Path, console: Console) -> None:
    """All probes of a frozen backbone; the bright corner is easy even for random features."""
    out = tmp_path / "linear"
    args = options(
        data, out,
        "cifar10_probes", "--backbone", "nin3", "--weights", str(whole / "backbone.safetensors"),
        "--run.device", "cpu", "--run.precision", "fp32", "--run.epochs", "3",
        "--train.batch-size", "10", "--val.batch-size", "10", "--train.workers", "1",
        "--train.no-flip", "--train.engine", "folder", "--val.engine", "folder",
        "--run.log-every-steps", "5",
    )  # fmt: skip
    text = execute("evaluate.py", args)
    assert "tensors loaded" in text
    scores = results(out)
    assert len(scores) == 9
    assert all(row["n"] == 19 for row in scores.values())
    best = max(float(str(row["value"])) for row in scores.values())
    assert best >= 80, scores
    sums = {row["checkpoint_sha256"] for row in scores.values()}
    assert sums == {results(whole)["accuracy"]["checkpoint_sha256"]}
    again = console()
    before = (out / "results.json").stat().st_mtime_ns
    assert processes.run(processes.evaluate, args, console=again) == [0]
    assert "finished already" in again.read_text()
    assert (out / "results.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("script", "given", "words"),
    [
        ("pretrain", ["quickstart", "--run.epoch", "3"], ["epochs"]),
        ("pretrain", ["quickstar"], ["quickstart"]),
        ("pretrain", ["quickstart", "--train.data", "nowhere.beton"], ["nowhere.beton"]),
        ("pretrain", ["quickstart", "--run.cuda-graph"], ["cuda_graph", "GPU"]),
        ("pretrain", ["quickstart", "--train.batch-size", "4000"], ["batch"]),
        ("evaluate", ["quickstart_linear"], ["--weights"]),
        ("evaluate", ["quickstart_linear", "--weights", "none.safetensors"], ["none.safet"]),
    ],
)
def test_a_users_mistake_is_one_line(
    data: Path, tmp_path: Path, console: Console, script: str, given: list[str], words: list[str]
) -> None:
    args = [given[0], *options(data, tmp_path / "run", "--run.device", "cpu"), *given[1:]]
    said = console()
    assert processes.run(getattr(processes, script), args, console=said) == [2]
    text = said.read_text()
    assert "Traceback" not in text
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("script", "recipe"), [("pretrain", "rotnet_in1k_r50"), ("evaluate", "in1k_linear")]
)
def test_help_explains_recipes_and_fields(console: Console, script: str, recipe: str) -> None:
    said = console()
    assert processes.run(getattr(processes, script), ["--help"], console=said) == [0]
    assert recipe in said.read_text()
    said = console()
    assert processes.run(getattr(processes, script), [recipe, "--help"], console=said) == [0]
    text = said.read_text()
    for field in ("--train.batch-size", "--run.precision", "--train.crop.size"):
        assert field in text
    assert "Images per process and step." in text
