"""The run folder: rows, results, resuming, full disks, closed outputs, locks."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
import termios
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipelines.spec import CenterCrop, LoaderSpec
from rotpred.distributed import Rank
from rotpred.records.console import Console, configure_logging, describe, duration
from rotpred.records.folder import DONE
from rotpred.records.log import RunLog, lock, read_results, read_rows

pytestmark = pytest.mark.timeout(90)


@dataclass(frozen=True)
class Recipe:
    name: str = "tiny"
    lr: float = 0.1
    steps: tuple[int, ...] = (30, 50)
    train: LoaderSpec = field(default_factory=lambda: LoaderSpec(crop=CenterCrop(size=8)))
    out: Path = Path("runs/x")


def open_log(out: Path, *, main: bool = True, world: int = 1, start_step: int = 0) -> RunLog:
    rank = Rank(rank=0 if main else 1, world=world if main else 2)
    return RunLog(out, Recipe(), rank, total_steps=100, start_step=start_step)


def record(log: RunLog, step: int, **values: float) -> None:
    log.interval(
        step=step,
        epoch=step // 50,
        values=values or {"loss": 1.25, "accuracy": 43.75, "lr": 0.1},
        images=640,
        views=2560,
        wait_seconds=0.5,
        seconds=2.0,
    )


def run_child(code: str, *, closing: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python in a separate process; `closing` is shell code that breaks its stdout."""
    return subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -W error - {closing}'],
        input=textwrap.dedent(code),
        text=True,
        capture_output=True,
        timeout=80,
        check=False,
    )


CHILD = """
from pathlib import Path
from matplotlib.figure import Figure
from rotpred.distributed import Rank
from rotpred.records.log import RunLog, configure_logging
configure_logging()
out = Path({out!r})
with RunLog(out, object(), Rank(), total_steps=9) as log:
    for step in range(1, 10):
        {each}
        log.interval(step=step, epoch=0, values=dict(loss=1.0), images=1, views=4,
                     wait_seconds=0.0, seconds=1.0)
    log.figure("empty", Figure())
    log.result("b", metric="m", value=1.0, unit="%", n=1)
(out / "finished").touch()
"""


def test_run_folder_holds_recipe_and_environment(tmp_path: Path) -> None:
    with open_log(tmp_path / "runs" / "a"):
        pass
    out = tmp_path / "runs" / "a"
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["type"], recipe["lr"], recipe["steps"]) == ("Recipe", 0.1, [30, 50])
    assert recipe["train"]["crop"] == {"type": "CenterCrop", "size": 8, "resize": 256}
    assert recipe["out"] == "runs/x"
    env = json.loads((out / "env.json").read_text())
    assert env["python"] == ".".join(map(str, sys.version_info[:3]))
    assert env["cores"] == len(os.sched_getaffinity(0))
    assert env["torch"].startswith("2.") and env["device"] == "cpu" and env["cpu"]
    assert {"torchvision", "numpy", "ffcv", "dali", "git", "world"} <= env.keys()
    assert not list(out.glob(".*.tmp"))


def test_interval_does_the_throughput_arithmetic(tmp_path: Path) -> None:
    with open_log(tmp_path, world=3) as log:
        record(log, 10)
        record(log, 20)
    rows = read_rows(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [10, 20]
    row = rows[1]
    assert row["images_per_s"] == 3 * 640 / 2
    assert row["views_per_s"] == 4 * row["images_per_s"]
    assert row["data_wait_percent"] == 25.0
    assert row["seconds_left"] == pytest.approx(80 * 0.2)
    assert (row["loss"], row["accuracy"], row["lr"]) == (1.25, 43.75, 0.1)
    assert isinstance(row["rss_mib"], float) and 50 < row["rss_mib"] < 100_000


def test_a_value_that_is_not_finite_stays_valid_json(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        record(log, 10, loss=float("nan"), accuracy=float("inf"))
    text = (tmp_path / "log.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row["loss"] is None and row["accuracy"] is None


def test_console_line_says_everything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rotpred"), open_log(tmp_path) as log:
        record(log, 10)
    (line,) = [r.getMessage() for r in caplog.records if "step" in r.getMessage()]
    pattern = (
        r"step  10/100  epoch 0  loss 1\.2500  accuracy  43\.8 %  lr 0\.1  320 images/s  "
        r"1,280 views/s  data wait 25 %  memory \d+\.\d GiB  18 s left"
    )
    assert re.fullmatch(pattern, line), line


def test_describe_prefers_the_memory_of_the_gpu() -> None:
    row = {
        "step": 1,
        "epoch": 0,
        "images_per_s": 1.0,
        "views_per_s": 4.0,
        "data_wait_percent": 0.0,
        "seconds_left": None,
        "rss_mib": 1.0,
        "cuda_peak_mib": 2048.0,
    }
    line = describe(row, values={"top1_res4": 12.345678}, total_steps=5)
    assert "GPU 2.0 GiB" in line and "top1_res4 12.35" in line and "left" not in line


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (723, "12 min 03 s"),
        (18420, "5 h 07 min"),
        (183600, "2 d 03 h"),
    ],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_tensorboard_holds_the_scalars_and_the_image(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(tmp_path) as log:
        record(log, 10)
        record(log, 20)
        log.figure("views", Figure(figsize=(2, 1), dpi=50))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 1.25), (20, 1.25)]
    assert [e.value for e in events.Scalars("loader/views_per_s")] == [1280.0, 1280.0]
    assert [e.step for e in events.Images("views")] == [20]
    with Image.open(tmp_path / "figures" / "views.png") as image:
        assert image.size == (100, 50)


def test_resume_drops_the_rows_of_lost_work(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        for step in (10, 20, 30):
            record(log, step)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # the machine went down during a write
    with open_log(tmp_path, start_step=20) as log:
        record(log, 25)
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [10, 20, 25]
    with open_log(tmp_path, start_step=25) as log:
        record(log, 35)
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [10, 20, 25, 35]


def test_a_run_that_starts_over_starts_its_log_over(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        record(log, 10)
    with open_log(tmp_path) as log:
        log.result("b", metric="m", value=1.0, unit="%", n=1)
    assert len(read_rows(tmp_path / "log.jsonl")) == 1, "a log is not touched before its first row"
    with open_log(tmp_path) as log:
        record(log, 5)
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [5]


def test_a_torn_line_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st\n\n{"step": 3}\n')
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [1, 3]
    assert "line 2 is not a JSON object" in caplog.text


def test_results_are_rows_that_later_measurements_correct(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.result("rotation", metric="accuracy", value=60, unit="%", n=40000, chance=25.0)
        log.result("linear", metric="top1/res4", value=50.5, unit="%", n=10000, seconds=12.34)
        log.result(
            "rotation", metric="accuracy", value=68.4, unit="%", n=40000, checkpoint_sha256="ab"
        )
    linear, rotation = read_results(tmp_path / "results.json")
    assert linear == {
        "benchmark": "linear",
        "metric": "top1/res4",
        "value": 50.5,
        "unit": "%",
        "n": 10000,
        "checkpoint_sha256": None,
        "recipe": "tiny",
        "seconds": 12.3,
    }
    assert (rotation["value"], rotation["checkpoint_sha256"]) == (68.4, "ab")


@pytest.mark.parametrize("start_step", [0, 50])
def test_results_of_earlier_settings_are_not_kept(tmp_path: Path, start_step: int) -> None:
    """A resumed run may be validated on other data."""
    with open_log(tmp_path) as log:
        log.result("knn", metric="top1/k=20", value=60, unit="%", n=400)
    (tmp_path / DONE).write_text("{}")
    with pytest.raises(KeyboardInterrupt), open_log(tmp_path, start_step=start_step):
        raise KeyboardInterrupt
    assert not (tmp_path / DONE).exists()
    assert [row["metric"] for row in read_results(tmp_path / "results.json")] == ["top1/k=20"]
    with open_log(tmp_path, start_step=start_step) as log:
        log.result("knn", metric="top1/k=5", value=55, unit="%", n=400)
    (row,) = read_results(tmp_path / "results.json")
    assert row["metric"] == "top1/k=5"


def test_a_folder_is_that_of_one_recipe(tmp_path: Path) -> None:
    with lock(tmp_path, "tiny"), open_log(tmp_path):
        pass
    with lock(tmp_path, "tiny"), lock(tmp_path / "other", "huge"):
        pass
    words = "holds a run of tiny: choose another folder for huge with --run.out"
    with pytest.raises(ValueError, match=words), lock(tmp_path, "huge"):
        pass
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match=r"recipe\.json is not JSON"), lock(tmp_path, "tiny"):
        pass


def test_a_result_must_be_a_number(tmp_path: Path) -> None:
    with open_log(tmp_path) as log, pytest.raises(ValueError, match="linear top1 is nan"):
        log.result("linear", metric="top1", value=float("nan"), unit="%", n=1)


@pytest.mark.parametrize("text", ["{}", "[1]", "[{]"])
def test_foreign_results_are_refused_at_the_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json is not"), open_log(tmp_path):
        pass
    assert (tmp_path / "results.json").read_text() == text


def test_results_survive_a_write_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_log(tmp_path) as log:
        log.result("a", metric="m", value=1.0, unit="%", n=1)
        before = (tmp_path / "results.json").read_bytes()

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        log.result("b", metric="m", value=2.0, unit="%", n=1)
        assert (tmp_path / "results.json").read_bytes() == before
        assert not list(tmp_path.glob(".*.tmp"))
        assert "No space left" in caplog.text
        monkeypatch.undo()
        log.result("c", metric="m", value=3.0, unit="%", n=1)
    assert [r["benchmark"] for r in read_results(tmp_path / "results.json")] == ["a", "b", "c"]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    with open_log(tmp_path / "a", main=False) as log:
        log.tick(5)
        log.tick(6)
        record(log, 10)
        log.result("b", metric="m", value=float("nan"), unit="%", n=1)
        log.figure("x", Figure())
    assert not (tmp_path / "a").exists()


def test_a_full_disk_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with open_log(tmp_path) as log:
        for step in (10, 20, 30):
            record(log, step)
        log.result("b", metric="m", value=1.0, unit="%", n=1)
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "No space left on device" in warnings[0]
    assert len(read_results(tmp_path / "results.json")) == 1


@pytest.mark.parametrize("kind", ["interval", "validation"])
def test_a_disk_that_is_full_at_a_resume_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """The row that finds the disk full is lost; the repeated ones are dropped at the next row."""

    def write(log: RunLog, step: int) -> None:
        if kind == "interval":
            record(log, step)
        else:
            log.validation(step=step, values={"top1": 50.0})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with open_log(tmp_path) as log:
        write(log, 10)
        write(log, 20)
    with open_log(tmp_path, start_step=10) as log:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            write(log, 20)
            write(log, 25)
        write(log, 30)
        write(log, 40)
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "No space left on device" in warnings[0]
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [10, 30, 40]


def test_files_that_cannot_grow_do_not_end_the_run(tmp_path: Path) -> None:
    """All files of the folder at once, TensorBoard's included, by a limit of the kernel."""
    limit = "__import__('resource').setrlimit(1, (0, 0))" if sys.platform == "linux" else ""
    done = run_child(CHILD.format(out=str(tmp_path), each=f"{limit} if step == 5 else None"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "finished").exists()
    assert done.stderr.count("cannot write to the run folder") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("closing", [">&-", "| head -n 1 >/dev/null; exit ${PIPESTATUS[0]}"])
def test_a_closed_stdout_costs_one_warning(tmp_path: Path, closing: str) -> None:
    # The pause lets `head` exit between two lines.
    code = CHILD.format(out=str(tmp_path), each="__import__('time').sleep(0.05)")
    done = run_child(code, closing=closing)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "finished").exists()
    assert done.stderr.count("cannot write to standard output") == 1, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert len(read_rows(tmp_path / "log.jsonl")) == 9


def test_a_bar_on_a_terminal_only(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 120))
    code = CHILD.format(out=str(tmp_path / "tty"), each="None")
    with subprocess.Popen(
        [sys.executable, "-"], stdin=subprocess.PIPE, stdout=slave, stderr=slave
    ) as child:
        os.close(slave)
        assert child.stdin is not None
        child.stdin.write(code.encode())
        child.stdin.close()
        shown = b""
        try:
            while chunk := os.read(master, 4096):
                shown += chunk
        except OSError:  # Linux reports the end of a pseudo-terminal as EIO
            pass
        assert child.wait(timeout=60) == 0
    os.close(master)
    assert b"/9 [" in shown and b"step 9/9" in shown
    done = run_child(CHILD.format(out=str(tmp_path / "pipe"), each="None"))
    assert done.stderr == "" and "/9 [" not in done.stdout


def test_logging_of_other_ranks_is_warnings_with_their_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loggers = [logging.getLogger(name) for name in ("rotpred", "pipelines")]
    before = [(log.handlers, log.level) for log in loggers]
    try:
        configure_logging()
        configure_logging(rank=3)
        logging.getLogger("pipelines.engines.ffcv.source").info("not shown")
        logging.getLogger("pipelines.engines.ffcv.source").warning("shown")
        assert sum(isinstance(h, Console) for h in loggers[0].handlers) == 1
    finally:
        for log, (handlers, level) in zip(loggers, before, strict=True):
            log.handlers = handlers
            log.setLevel(level)
    streams = capsys.readouterr()
    assert streams.out == ""
    assert re.fullmatch(r"\d\d:\d\d:\d\d  \[rank 3\] shown\n", streams.err)


def test_lock_refuses_a_second_job(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with lock(out, "tiny"):
        with (
            pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on"),
            lock(out, "tiny"),
        ):
            pass
        done = run_child(
            f"""
            from pathlib import Path
            from rotpred.records.log import lock
            with lock(Path({str(out)!r}), "tiny"):
                pass
            """
        )
        assert done.returncode == 1 and "two jobs in one run folder" in done.stderr
    with lock(out, "tiny"):
        pass


def test_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from rotpred.records.log import lock
with lock(Path({str(tmp_path)!r}), "tiny"):
    os.kill(os.getpid(), 9)
"""
    assert run_child(code).returncode in (-9, 137)
    with lock(tmp_path, "tiny"):
        pass
