"""Ranks and collectives, with two gloo processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from rotpred import distributed
from rotpred.distributed import Rank
from tests.support.processes import torchrun

pytestmark = pytest.mark.timeout(120)


PROGRAM = """
import json, os, pathlib, sys, torch
from rotpred import distributed as d

with d.process_group("cpu", timeout_seconds=30) as rank:
    base = torch.tensor([1.0, 10.0]) * (rank.rank + 1)
    got = {
        "rank": rank.rank,
        "world": rank.world,
        "main": rank.main,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "sum": d.all_sum(base, rank).tolist(),
        "input": base.tolist(),
        "one": d.any_true(rank.rank == 1, rank),
        "none": d.any_true(False, rank),
        "text": d.from_main(lambda: f"checkpoint é {rank.rank}", rank),
        "list": d.from_main(lambda: [rank.rank, None], rank),
        "empty": d.from_main(lambda: "" if rank.main else "x", rank),
        "rows": d.gather_rows(torch.full((2, 1), rank.rank), rank).flatten().tolist(),
    }
    d.check_equal(7, rank, what="steps")
    try:
        d.check_equal(7 + rank.rank, rank, what="steps")
    except RuntimeError as error:
        got["unequal"] = str(error)
    try:
        d.from_main(lambda: int("seven"), rank)
    except ValueError as error:
        got["failed"] = str(error)
    d.barrier(rank)
got["after"] = torch.distributed.is_initialized()
pathlib.Path(sys.argv[1], f"{rank.rank}.json").write_text(json.dumps(got))
"""


def test_two_processes_agree(tmp_path: Path) -> None:
    done = torchrun(tmp_path, PROGRAM)
    assert done.returncode == 0, done.stderr
    for k in (0, 1):
        got = json.loads((tmp_path / f"{k}.json").read_text())
        assert (got["rank"], got["world"], got["main"]) == (k, 2, k == 0)
        assert got["sum"] == [3.0, 30.0]
        assert got["input"] == [1.0 * (k + 1), 10.0 * (k + 1)], "all_sum changed its input"
        assert (got["one"], got["none"]) == (True, False)
        assert (got["text"], got["list"], got["empty"]) == ("checkpoint é 0", [0, None], "")
        assert got["failed"] == "invalid literal for int() with base 10: 'seven'"
        assert got["rows"] == [0, 0, 1, 1]
        assert got["unequal"] == "ranks disagree about steps: from 7 to 8"
        # torchrun's own OMP_NUM_THREADS=1 must not hide the cores.
        assert got["threads"] == max(1, got["cores"] // 2)
        assert got["after"] is False


def test_an_absent_peer_is_noticed(tmp_path: Path) -> None:
    program = (
        "import time\nfrom rotpred import distributed as d\n"
        'with d.process_group("cpu", timeout_seconds=3) as rank:\n'
        "    time.sleep(60) if rank.rank else d.barrier(rank)\n"
    )
    done = torchrun(tmp_path, program, limit_seconds=50)
    assert done.returncode != 0
    assert "imed out" in done.stderr or "imeout" in done.stderr


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*distributed.VARIABLES, "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.usefixtures("alone")
def test_world_of_one_needs_no_group() -> None:
    before = torch.get_num_threads()
    try:
        with distributed.process_group("cpu") as rank:
            assert rank == Rank() and rank.main
            assert not torch.distributed.is_initialized()
            tensor = torch.ones(2)
            assert distributed.all_sum(tensor, rank) is tensor
            assert distributed.any_true(True, rank) is True
            assert distributed.from_main(lambda: "a", rank) == "a"
            assert distributed.gather_rows(tensor, rank) is tensor
            distributed.check_equal(1, rank, what="steps")
            distributed.barrier(rank)
    finally:
        torch.set_num_threads(before)


def test_threads_share_the_allowed_cores(alone: pytest.MonkeyPatch) -> None:
    alone.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert [distributed.cpu_threads(n) for n in (1, 5, 20)] == [12, 2, 1]
    alone.setenv("OMP_NUM_THREADS", "3")
    assert distributed.cpu_threads(5) == 3
    alone.setenv("OMP_NUM_THREADS", "1")
    assert distributed.cpu_threads(2) == 1, "without torchrun, 1 is the user's wish"
    alone.setenv("TORCHELASTIC_RUN_ID", "none")
    assert distributed.cpu_threads(2) == 6
    assert distributed.cpu_threads(1) == 1, "torchrun sets it for several processes only"


def opened(device: str) -> Rank:
    with distributed.process_group(device) as rank:
        return rank


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("0", "torchrun"),
        ("0 0 x 1", "WORLD_SIZE='x'"),
        ("2 0 2 2", "RANK=2"),
        ("1 1 2 1", "LOCAL_RANK=1"),
    ],
)
def test_broken_environments_are_refused(
    alone: pytest.MonkeyPatch, values: str, words: str
) -> None:
    for name, value in zip(distributed.VARIABLES, values.split(), strict=False):
        alone.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        opened("cpu")


def test_devices_are_checked(alone: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected auto, cpu, cuda"):
        opened("gpu")
    alone.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="no CUDA device"):
        opened("cuda")
    alone.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="torch sees 2"):
        opened("cuda:2")
