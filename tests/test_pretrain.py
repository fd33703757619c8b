"""Pretraining end to end on tiny betons: results, resume, signals, several processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.convert import write_beton
from pipelines.images import MemoryImages
from rotpred.backbone import build_backbone
from rotpred.checkpoint import load_latest
from rotpred.weights import load_backbone

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

ROOT = Path(__file__).parent.parent
SMALL = [
    "quickstart", "--backbone", "nin3", "--train.batch-size", "8", "--val.batch-size", "8",
    "--run.device", "cpu", "--run.epochs", "2", "--run.log-every", "2", "--run.save-every", "2",
    "--train.timeout", "60", "--train.workers", "1", "--val.workers", "1", "--run.timeout", "60",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Betons train (50 pictures) and val (19) of two classes that differ in their bright corner."""
    folder = tmp_path_factory.mktemp("data")
    for name, n in (("train", 50), ("val", 19)):
        generator = np.random.default_rng(n)
        pictures = generator.integers(0, 90, (n, 32, 32, 3), dtype=np.uint8)
        labels = np.arange(n) % 2
        for picture, label in zip(pictures, labels, strict=True):
            picture[:12, slice(0, 12) if label else slice(20, 32)] += 150
        images = MemoryImages(
            lambda i, p=pictures: p[i], labels.astype(np.int64), ("left", "right")
        )
        write_beton(images, folder / f"{name}.beton", workers=1)
    return folder


def command(script: str, data: Path, out: Path, *more: str, processes: int = 0) -> list[str]:
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(processes)]
    options = ["--train.data", str(data / "train.beton"), "--val.data", str(data / "val.beton")]
    return [*start, str(ROOT / "scripts" / script), *more, *options, "--run.out", str(out)]


def execute(args: list[str], *, status: int = 0, threads: str = "1") -> str:
    """Run to the end, check the exit status, return what was printed."""
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    done = subprocess.run(
        args, capture_output=True, text=True, timeout=200, env=environment, check=False
    )
    text = done.stdout + done.stderr
    assert done.returncode == status, text[-4000:]
    return text


def wait_for_step(job: subprocess.Popen[bytes], out: Path, step: int) -> bool:
    """Whether the job logged this step, before it ended and within two minutes."""
    log = out / "log.jsonl"
    for _ in range(1200):
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(timeout=0.1)
            return False
        lines = log.read_text().splitlines() if log.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return True
    return False


def final(out: Path) -> dict[str, torch.Tensor]:
    latest = load_latest(out / "checkpoints")
    assert latest is not None
    weights: dict[str, torch.Tensor] = latest.state["model"]
    return weights


def results(out: Path) -> dict[str, dict[str, object]]:
    return {row["metric"]: row for row in json.loads((out / "results.json").read_text())}


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run that others are compared with."""
    out = tmp_path_factory.mktemp("whole") / "run"
    execute(command("pretrain.py", data, out, *SMALL))
    return out


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
def test_killed_run_resumes_bit_for_bit(data: Path, whole: Path, tmp_path: Path, stop: int) -> None:
    """SIGKILL in mid-epoch, at its end and just before the end: same weights, same samples."""
    out = tmp_path / "run"
    args = command("pretrain.py", data, out, *SMALL)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "console").open("w") as console:
        job = subprocess.Popen(args, stdout=console, stderr=console, env=environment)
        reached = wait_for_step(job, out, stop - 1)
        job.kill()
        job.wait(timeout=30)
    assert reached, (tmp_path / "console").read_text()[-3000:]
    execute(args)
    expected, resumed = final(whole), final(out)
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
    same = ("value", "n", "checkpoint_sha256", "stream_digest")
    assert [results(out)["accuracy"][k] for k in same] == [
        results(whole)["accuracy"][k] for k in same
    ]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps))


def test_finished_run_is_left_alone(data: Path, whole: Path) -> None:
    before = (whole / "backbone.safetensors").stat().st_mtime_ns
    text = execute(command("pretrain.py", data, whole, *SMALL))
    assert "finished already" in text
    assert (whole / "backbone.safetensors").stat().st_mtime_ns == before


def test_other_recipe_in_the_same_folder_is_refused(data: Path, whole: Path) -> None:
    text = execute(
        command("pretrain.py", data, whole, *SMALL, "--optim.lr", "0.3", "--train.seed", "5"),
        status=2,
    )
    assert "belongs to another run" in text and "seed: 0 there, 5 now" in text
    assert "Traceback" not in text


def test_sigterm_writes_a_checkpoint_and_a_status(data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = command("pretrain.py", data, out, *SMALL, "--run.save-every", "1000")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "console").open("w") as console:
        job = subprocess.Popen(args, stdout=console, stderr=console, env=environment)
        assert wait_for_step(job, out, 1), (tmp_path / "console").read_text()[-3000:]
        job.send_signal(signal.SIGTERM)
        status = job.wait(timeout=60)
    text = (tmp_path / "console").read_text()
    assert status == 75 and "stopped by a signal" in text, text[-3000:]
    assert "Traceback" not in text
    execute(args)
    for name, tensor in final(whole).items():
        assert torch.equal(tensor, final(out)[name]), name


def test_two_processes_meet_the_samples_of_one(data: Path, tmp_path: Path) -> None:
    """Same global batch: same sample ids and boxes; the validation counts every picture once."""
    one, two = tmp_path / "one", tmp_path / "two"
    execute(command("pretrain.py", data, one, *SMALL, "--run.max-steps", "6", processes=1))
    execute(
        command(
            "pretrain.py",
            data,
            two,
            *SMALL,
            "--run.max-steps",
            "6",
            "--train.batch-size",
            "4",
            processes=2,
        )
    )
    first, second = results(one)["accuracy"], results(two)["accuracy"]
    assert first["stream_digest"] == second["stream_digest"]
    assert first["n"] == second["n"] == 76


def test_resumed_on_another_number_of_processes(data: Path, whole: Path, tmp_path: Path) -> None:
    """Begun by one process, ended by two: the digest covers every sample and box of the run."""
    out = tmp_path / "run"
    execute(command("pretrain.py", data, out, *SMALL, "--run.max-steps", "5"))
    execute(command("pretrain.py", data, out, *SMALL, "--train.batch-size", "4", processes=2))
    digest = results(out)["accuracy"]["stream_digest"]
    assert digest == results(whole)["accuracy"]["stream_digest"]


def test_sigterm_stops_all_processes_at_the_same_step(data: Path, tmp_path: Path) -> None:
    """And what goes on from there ends with the bits of an uninterrupted run of two."""
    pair = [*SMALL, "--train.batch-size", "4", "--run.save-every", "1000"]
    calm, out = tmp_path / "calm", tmp_path / "run"
    execute(command("pretrain.py", data, calm, *pair, processes=2))
    args = command("pretrain.py", data, out, *pair, processes=2)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "console").open("w") as console:
        job = subprocess.Popen(args, stdout=console, stderr=console, env=environment)
        assert wait_for_step(job, out, 1), (tmp_path / "console").read_text()[-3000:]
        job.send_signal(signal.SIGTERM)
        job.wait(timeout=60)
    text = (tmp_path / "console").read_text()
    steps = set(re.findall(r"stopped by a signal after step (\d+)", text))
    assert len(steps) == 1, text[-3000:]
    latest = load_latest(out / "checkpoints")
    assert latest is not None and latest.step == int(steps.pop())
    execute(args)
    for name, tensor in final(calm).items():
        assert torch.equal(tensor, final(out)[name]), name


def test_accumulation_resumes_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """Checkpoints fall between updates only, so no pending gradient is lost."""
    options = [*SMALL, "--run.accumulate", "4", "--run.save-every", "1"]
    calm, out = tmp_path / "calm", tmp_path / "run"
    execute(command("pretrain.py", data, calm, *options))
    with (tmp_path / "console").open("w") as console:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        args = command("pretrain.py", data, out, *options)
        job = subprocess.Popen(args, stdout=console, stderr=console, env=environment)
        assert wait_for_step(job, out, 6), (tmp_path / "console").read_text()[-3000:]
        job.kill()
        job.wait(timeout=30)
    execute(args)
    for name, tensor in final(calm).items():
        assert torch.equal(tensor, final(out)[name]), name


@pytest.mark.parametrize("engine", ["folder", "dali"])
def test_engines_meet_the_same_samples(
    data: Path, whole: Path, tmp_path: Path, engine: str
) -> None:
    if engine == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    out = tmp_path / "run"
    execute(command("pretrain.py", data, out, *SMALL, "--train.engine", engine))
    digest = results(out)["accuracy"]["stream_digest"]
    assert digest == results(whole)["accuracy"]["stream_digest"]


def test_a_loss_that_is_not_finite_stops_all_ranks(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    text = execute(
        command(
            "pretrain.py",
            data,
            out,
            *SMALL,
            "--optim.lr",
            "1e30",
            "--train.batch-size",
            "4",
            processes=2,
        ),
        status=1,
    )
    assert "was not finite" in text
    latest = load_latest(out / "checkpoints")
    if latest is not None:
        assert all(t.isfinite().all() for t in latest.state["model"].values())


def test_accumulation_and_mixed_precision(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    execute(
        command(
            "pretrain.py",
            data,
            out,
            *SMALL,
            "--run.accumulate",
            "2",
            "--run.precision",
            "bf16",
            "--run.max-steps",
            "2",
        )
    )
    assert results(out)["accuracy"]["n"] == 76


def test_linear_evaluation(data: Path, whole: Path, tmp_path: Path) -> None:
    """All probes of a frozen trunk; the bright corner is easy, even for random features."""
    out = tmp_path / "linear"
    options = [
        "cifar10_probes", "--backbone", "nin3", "--weights", str(whole / "backbone.safetensors"),
        "--run.device", "cpu", "--run.precision", "fp32", "--run.epochs", "3",
        "--train.batch-size", "10", "--val.batch-size", "10", "--train.workers", "1",
        "--train.no-flip", "--run.log-every", "5",
    ]  # fmt: skip
    text = execute(command("evaluate.py", data, out, *options))
    assert "tensors loaded" in text
    scores = results(out)
    assert len(scores) == 9
    assert all(row["n"] == 19 for row in scores.values())
    best = max(float(str(row["value"])) for row in scores.values())
    assert best >= 80, scores
    sums = {row["checkpoint_sha256"] for row in scores.values()}
    assert sums == {results(whole)["accuracy"]["checkpoint_sha256"]}


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        ("pretrain.py", ["quickstart", "--run.epoch", "3"], ["epochs"]),
        ("pretrain.py", ["quickstar"], ["quickstart"]),
        ("pretrain.py", ["quickstart", "--train.data", "nowhere.beton"], ["nowhere.beton"]),
        ("pretrain.py", ["quickstart", "--sync-bn", "torch"], ["sync_bn", "GPU"]),
        ("pretrain.py", ["quickstart", "--train.batch-size", "4000"], ["batch"]),
        ("evaluate.py", ["quickstart_linear"], ["--weights"]),
        ("evaluate.py", ["quickstart_linear", "--weights", "none.safetensors"], ["none.safet"]),
    ],
)
def test_a_users_mistake_is_one_line(
    data: Path, tmp_path: Path, script: str, options: list[str], words: list[str]
) -> None:
    given = command(script, data, tmp_path / "run", "--run.device", "cpu")
    given = given[:2] + options[:1] + given[2:] + options[1:]
    text = execute(given, status=2)
    assert "Traceback" not in text
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("script", "recipe"), [("pretrain.py", "rotnet_in1k_r50"), ("evaluate.py", "in1k_linear")]
)
def test_help_explains_recipes_and_fields(script: str, recipe: str) -> None:
    text = execute([sys.executable, str(ROOT / "scripts" / script), "--help"])
    assert recipe in text
    text = execute([sys.executable, str(ROOT / "scripts" / script), recipe, "--help"])
    for field in ("--train.batch-size", "--run.precision", "--train.crop.size"):
        assert field in text
    assert "Source images per process" in text
