"""Compiled kernels: the cache of machine code, and the threads that run them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines.native import jit
from pipelines.native.threads import DaemonWorker, LaneThreads

pytestmark = pytest.mark.timeout(150)


def package(folder: Path) -> Path:
    folder.mkdir()
    (folder / "caller.py").write_text(
        "from pipelines.native.jit import njit\nfrom callee import f\n"
    )
    (folder / "callee.py").write_text("from pipelines.native.jit import njit\nONE = 1\n")
    (folder / "plain.py").write_text("import numpy\n")
    (folder / "inner").mkdir()
    (folder / "inner" / "deep.py").write_text("import numpy\n")
    return folder


def test_any_change_of_a_source_or_the_compiler_is_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numba.config.CACHE_DIR", "")
    source = package(tmp_path / "p")
    first = jit.cache_folder(source)
    assert first is not None and first.parent == source / "__pycache__"
    (source / "plain.py").write_text("import torch\n")
    other = jit.cache_folder(source)
    (source / "plain.py").write_text("import numpy\n")
    assert jit.cache_folder(source) == first
    (source / "callee.py").write_text("from pipelines.native.jit import njit\nONE = 2\n")
    changed = jit.cache_folder(source)
    (source / "callee.py").rename(source / "other.py")
    renamed = jit.cache_folder(source)
    (source / "inner" / "deep.py").write_text("import torch\n")
    below = jit.cache_folder(source)
    (source / "inner").rename(source / "renamed")
    moved = jit.cache_folder(source)
    monkeypatch.setattr("llvmlite.__version__", "0")
    assert len({first, other, changed, renamed, below, moved, jit.cache_folder(source)}) == 7


def test_every_module_compiles_through_this_one() -> None:
    """A module that used numba's decorators directly would cache its machine code elsewhere."""
    folder = Path(jit.__file__).parents[1]
    for path in folder.rglob("*.py"):
        text = path.read_text()
        if path.name != "jit.py":
            assert "numba.njit" not in text and "import njit" not in text.replace(
                "from pipelines.native.jit import njit", ""
            ), path


def test_the_folder_is_the_users_where_that_is_set_or_the_package_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = package(tmp_path / "p")
    (source / "__pycache__").write_text("no folder: nothing can be written below it")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr("numba.config.CACHE_DIR", "")
    found = jit.cache_folder(source)
    assert found is not None and found.parent == tmp_path / "user" / "rotpred"
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path / "given"))
    assert jit.cache_folder(source) == tmp_path / "given" / found.name
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert jit.cache_folder(source) is None
    assert "cannot be kept" in caplog.text


def test_folders_of_old_sources_go_when_nobody_used_them_for_a_month(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    source = package(tmp_path / "p")
    for name, days in (("rotpred-old", 40), ("rotpred-recent", 3), ("of-others", 40)):
        (tmp_path / name).mkdir()
        then = time.time() - days * 86400
        os.utime(tmp_path / name, (then, then))
    found = jit.cache_folder(source)
    assert found is not None
    assert {p.name for p in tmp_path.iterdir()} == {"rotpred-recent", "of-others", "p", found.name}


_COUNT = """
import sys
from numba.core.dispatcher import Dispatcher
from pipelines.precompile import compile_all

compile_all()
found = {
    id(value): value
    for name, module in list(sys.modules.items())
    if name.startswith("pipelines.")
    for value in vars(module).values()
    if isinstance(value, Dispatcher)
}
print(len(found), sum(sum(f.stats.cache_misses.values()) for f in found.values()))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_second_process_compiles_nothing() -> None:
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", _COUNT], capture_output=True, text=True, timeout=140, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        functions, misses = map(int, done.stdout.split()[-2:])
        assert functions > 15
    assert misses == 0


def test_lanes_run_at_the_same_time_and_all_of_them() -> None:
    lanes, meeting, seen = LaneThreads(3), threading.Barrier(3, timeout=20), list[int]()

    def work(lane: int) -> None:
        meeting.wait()
        seen.append(lane)

    for _ in range(4):
        lanes.run(work, 3)
    assert sorted(seen) == [0] * 4 + [1] * 4 + [2] * 4
    assert sum(t.name.startswith("lane") for t in threading.enumerate()) == 2
    lanes.close()
    assert not any(t.name.startswith("lane") for t in threading.enumerate())


@pytest.mark.parametrize("broken", [0, 2])
def test_an_error_of_a_lane_is_raised_when_all_have_ended(broken: int) -> None:
    lanes, ended = LaneThreads(3), list[int]()
    gate = threading.Event()

    def work(lane: int) -> None:
        if lane == broken:
            gate.set()
            raise ValueError(f"lane {lane}")
        assert gate.wait(20)
        ended.append(lane)

    with pytest.raises(ValueError, match=f"lane {broken}"):
        lanes.run(work, 3)
    assert sorted(ended) == [lane for lane in range(3) if lane != broken]
    lanes.close()


def test_lanes_that_run_are_waited_for_where_another_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lanes, gate, ended = LaneThreads(3), threading.Event(), list[int]()
    lanes.run(int, 3)
    pool = lanes._pool
    assert pool is not None
    submit = pool.submit

    def once(*call: Any) -> Any:
        if gate.is_set():
            threading.Timer(0.2, meeting.set).start()
            raise RuntimeError("can't start new thread")
        gate.set()
        return submit(*call)

    meeting = threading.Event()

    def work(lane: int) -> None:
        assert meeting.wait(20)
        ended.append(lane)

    monkeypatch.setattr(pool, "submit", once)
    with pytest.raises(RuntimeError, match="new thread"):
        lanes.run(work, 3)
    assert ended == [1]
    lanes.close()


def test_a_daemon_worker_does_one_thing_after_the_other_and_hands_errors_over() -> None:
    worker, seen = DaemonWorker("steady"), list[int]()
    calls = [worker.submit(partial(seen.append, number)) for number in range(5)]
    wrong = worker.submit(partial(int, "x"))
    assert worker.submit(lambda: len(seen)).result(20) == 5 and seen == list(range(5))
    assert all(call.done() for call in calls)
    with pytest.raises(ValueError, match="invalid literal"):
        wrong.result(20)
    assert worker.close(20)
    assert not any(t.name == "steady" for t in threading.enumerate())


def test_a_daemon_worker_that_is_stuck_is_left_behind() -> None:
    worker, gate = DaemonWorker("stuck"), threading.Event()
    call, waiting = worker.submit(partial(gate.wait, 60)), worker.submit(int)
    assert waiting.cancel()
    assert not worker.close(0.05)
    (thread,) = [t for t in threading.enumerate() if t.name == "stuck"]
    assert thread.daemon  # the interpreter exits without it
    gate.set()
    assert call.result(20) is True
    thread.join(20)
    assert not thread.is_alive()


def test_a_daemon_worker_that_is_dropped_ends() -> None:
    worker = DaemonWorker("dropped")
    (thread,) = [t for t in threading.enumerate() if t.name == "dropped"]
    del worker
    thread.join(20)
    assert not thread.is_alive()


def _child(lanes: LaneThreads, results: object) -> None:
    seen = list[int]()
    lanes.run(seen.append, 3)
    lanes.close()
    results.send(sorted(seen))  # type: ignore[attr-defined]


# The child uses only threads of its own; Python warns about exactly what is tested here.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_makes_threads_of_its_own() -> None:
    lanes, seen = LaneThreads(3), list[int]()
    lanes.run(seen.append, 3)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(lanes, sender))
    child.start()
    assert receiver.poll(30) and receiver.recv() == [0, 1, 2]
    child.join(30)
    assert child.exitcode == 0
    lanes.close()
