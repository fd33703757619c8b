"""Checkpoints under kills, bit flips, full disks and hostile files."""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import storage
from pipelines.storage import sha256_file
from rotpred.models.backbone import build_backbone
from rotpred.models.heads import make_rotnet
from rotpred.training.checkpoint import CheckpointError, CheckpointFolder, load
from rotpred.weights.load import load_backbone

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[3]


def state(value: float) -> dict[str, object]:
    return {"w": torch.full((1000,), value), "epoch": 1, "lr": 0.1, "list": [1, (2.0, "a")]}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pt"))


def flip_bit(path: Path, text: bytes | None = None) -> None:
    """Flip one bit in the middle of the file, where the bytes of the tensor are."""
    data = bytearray(path.read_bytes())
    at = len(data) // 2 if text is None else data.index(text)
    data[at] ^= 1
    path.write_bytes(data)


def test_round_trip_of_everything_a_run_saves(tmp_path: Path) -> None:
    net = make_rotnet("nin3")
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    sgd.step()
    saved = {
        "model": net.state_dict(),
        "optimizer": sgd.state_dict(),
        "rng": torch.get_rng_state(),
        "loader": b"\x00\xff",
        "python_rng": (3, (1, 2, 3), None),
        "epoch": 3,
        "best": None,
    }
    path = CheckpointFolder(tmp_path / "new" / "folder").save(123, saved)
    assert path.name == "step_0000123.pt"
    got = CheckpointFolder(path.parent).latest()
    assert got is not None
    assert (got.step, got.path) == (123, path)
    assert {k: got.state[k] for k in ("loader", "python_rng", "epoch", "best")} == {
        k: saved[k] for k in ("loader", "python_rng", "epoch", "best")
    }
    make_rotnet("nin3").load_state_dict(got.state["model"], strict=True)
    sgd.load_state_dict(got.state["optimizer"])
    assert all(torch.equal(v, got.state["model"][k]) for k, v in net.state_dict().items())
    sidecar = json.loads(path.with_suffix(".json").read_text())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sidecar["sha256"]


def test_none_where_there_is_nothing(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path).latest() is None
    assert CheckpointFolder(tmp_path / "absent").latest() is None
    (tmp_path / "other.pt").write_text("x")
    assert CheckpointFolder(tmp_path).latest() is None


def test_the_latest_is_chosen_by_number(tmp_path: Path) -> None:
    for step in (9_999_999, 10_000_000, 123_456_789):  # one digit more than the padded name
        CheckpointFolder(tmp_path).save(step, state(step))
    os.utime(tmp_path / "step_9999999.pt")  # not by time or name
    got = CheckpointFolder(tmp_path).latest()
    assert got is not None and got.step == 123_456_789


@pytest.mark.parametrize(
    ("bad", "where"),
    [
        ({"a": np.float64(1)}, r"state\['a'\] is a numpy.float64"),
        ({"a": [0, {"b": Path("x")}]}, r"state\['a'\]\[1\]\['b'\] is a pathlib"),
        ({"a": np.zeros(2)}, "numpy.ndarray"),
        ({"a": collections.Counter()}, "collections.Counter"),
        ({"a": {(1, 2): 3}}, r"key \(1, 2\)"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, bad: object, where: str) -> None:
    with pytest.raises(CheckpointError, match=where):
        CheckpointFolder(tmp_path).save(1, bad)
    assert names(tmp_path) == []


def test_keeps_the_last_ones_and_the_best(tmp_path: Path) -> None:
    for step, score in enumerate((0.1, 0.9, 0.3, 0.4, 0.5), start=1):
        CheckpointFolder(tmp_path, keep=2).save(step, state(step))
        CheckpointFolder(tmp_path, keep=2).set_score(step, score)
    assert names(tmp_path) == [f"step_000000{k}.pt" for k in (2, 4, 5)]
    assert len(list(tmp_path.glob("*.json"))) == 3
    CheckpointFolder(tmp_path, keep=2).save(6, state(6))
    assert names(tmp_path) == [f"step_000000{k}.pt" for k in (2, 5, 6)], "6 has no score yet"
    before = (tmp_path / "step_0000006.pt").stat()
    CheckpointFolder(tmp_path, keep=2).set_score(6, 0.95)
    assert names(tmp_path) == [f"step_000000{k}.pt" for k in (5, 6)]
    after = (tmp_path / "step_0000006.pt").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert load(tmp_path / "step_0000006.pt").step == 6
    with pytest.raises(ValueError, match="keep"):
        CheckpointFolder(tmp_path, keep=1).save(7, state(7))
    with pytest.raises(ValueError, match="score"):
        CheckpointFolder(tmp_path).set_score(6, float("nan"))
    with pytest.raises(CheckpointError, match="step_0000009"):
        CheckpointFolder(tmp_path).set_score(9, 0.5)


def test_a_damaged_file_does_not_take_the_place_of_a_valid_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        CheckpointFolder(tmp_path, keep=3).save(step, state(step))
    flip_bit(tmp_path / "step_0000003.pt")
    CheckpointFolder(tmp_path, keep=2).save(4, state(4))
    assert "step_0000002.pt" in names(tmp_path), "3 is damaged: 4 and 2 are the last two"
    assert "step_0000001.pt" not in names(tmp_path)


def test_steps_of_an_abandoned_run_are_left_alone(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        CheckpointFolder(tmp_path, keep=2).save(step, state(step))
    for step in (5, 6, 7):
        CheckpointFolder(tmp_path, keep=2).save(step, state(step))
    assert names(tmp_path) == [f"step_{k:07d}.pt" for k in (6, 7, 20, 30)]


def test_a_flipped_bit_is_noticed_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        CheckpointFolder(tmp_path).save(step, state(step))
    damaged = tmp_path / "step_0000002.pt"
    flip_bit(damaged)
    torch.load(
        damaged, weights_only=True
    )  # torch alone does not notice, which is why there is a digest
    with caplog.at_level(logging.WARNING):
        got = CheckpointFolder(tmp_path).latest()
    assert got is not None and got.step == 1 and torch.equal(got.state["w"], torch.ones(1000))
    assert "skipping the checkpoint of step 2" in caplog.text
    assert "going back to the checkpoint of step 1" in caplog.text


@pytest.mark.parametrize("damage", ["truncate", "empty", "no sidecar", "sidecar cut"])
def test_other_damage_is_noticed_too(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        CheckpointFolder(tmp_path).save(step, state(step))
    path = tmp_path / "step_0000002.pt"
    if damage == "no sidecar":
        path.with_suffix(".json").unlink()
    elif damage == "sidecar cut":
        path.with_suffix(".json").write_text('{"sha')
    else:
        os.truncate(path, 0 if damage == "empty" else 700)
    with pytest.raises(CheckpointError):
        load(path)
    got = CheckpointFolder(tmp_path).latest()
    assert got is not None and got.step == 1
    CheckpointFolder(tmp_path).save(2, state(2))  # the damaged step can be written again
    assert load(path).step == 2


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_bit(CheckpointFolder(tmp_path).save(step, state(step)))
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        CheckpointFolder(tmp_path).latest()


class Evil:
    """Runs a command when unpickled without restrictions."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = CheckpointFolder(tmp_path).save(1, state(1))
    torch.save({"w": Evil(marker)}, path)
    record = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**record, "sha256": sha256_file(path)}))
    with pytest.raises(CheckpointError, match="more than tensors"):
        load(path)
    weights = tmp_path / "weights.pth"
    torch.save({"state_dict": Evil(marker)}, weights)
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_backbone(build_backbone("nin3"), weights)
    assert not marker.exists()
    torch.load(weights, weights_only=False)
    assert marker.exists(), "the file does attack a careless reader"


@pytest.mark.parametrize("step", [1, 2], ids=["same step again", "next step"])
@pytest.mark.parametrize("count", [0, 1], ids=["at the sidecar", "at the checkpoint"])
def test_killed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, count: int
) -> None:
    CheckpointFolder(tmp_path).save(1, state(1))
    calls = []
    real = os.replace

    def die(source: Path, target: Path) -> None:
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(target)
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        CheckpointFolder(tmp_path).save(step, state(7))
    got = CheckpointFolder(tmp_path).latest()
    assert got is not None and got.step == 1 and torch.equal(got.state["w"], torch.ones(1000))
    CheckpointFolder(tmp_path).save(3, state(3))
    assert not list(tmp_path.glob(".*")), "strays are swept"
    assert len(list(tmp_path.glob("*.json"))) == len(names(tmp_path))


KILLED = """
import json, logging, os, pathlib, random, signal, sys, time
import torch
from rotpred.training.checkpoint import CheckpointFolder

torch.set_num_threads(1)
random.seed(0)
folder = pathlib.Path(sys.argv[1])
warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("rotpred").addHandler(handler)

def state(step):
    return {"step": step, "w": torch.full((500_000,), float(step))}

CheckpointFolder(folder, keep=2).save(1, state(1))
strays, steps = 0, [1]
for _ in range(20):
    child = os.fork()
    if child == 0:
        step = steps[-1]
        while True:
            step += 1
            CheckpointFolder(folder, keep=2).save(step, state(step))
    time.sleep(random.uniform(0.005, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    strays += bool(list(folder.glob(".*.tmp")))
    found = CheckpointFolder(folder).latest()
    assert found.state["step"] == found.step >= steps[-1], (found.step, steps)
    assert bool((found.state["w"] == found.step).all())
    steps.append(found.step)
json.dump({"strays": strays, "steps": steps, "warnings": warnings}, sys.stdout)
"""


def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["strays"] > 0, "no kill hit a save: the test has proved nothing"
    assert got["steps"][-1] > 5
    assert got["warnings"] == []


def test_a_full_disk_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CheckpointFolder(tmp_path).save(1, state(1))
    big = {"w": torch.zeros(200_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # writes fail in the middle
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            CheckpointFolder(tmp_path).save(2, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    usage = shutil.disk_usage(tmp_path)._replace(free=1_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="2 MB are free"):
        CheckpointFolder(tmp_path).save(2, big)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0000001.json", "step_0000001.pt"]
    assert load(tmp_path / "step_0000001.pt").state["w"][0] == 1


def test_a_disk_that_lies_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CheckpointFolder(tmp_path).save(1, state(1))
    monkeypatch.setattr(storage, "sha256_file", lambda _: "0" * 64)
    with pytest.raises(CheckpointError, match="differs from what was written"):
        CheckpointFolder(tmp_path).save(2, state(2))
    assert names(tmp_path) == ["step_0000001.pt"]
