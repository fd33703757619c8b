"""Processes that start fast: forked from a server that has already imported the project.

They are real processes with their own environment, console, signals and exit status. Only the
seconds for importing torch are paid once for the whole suite.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from torch.distributed import TCPStore

from rotpred import cli, distributed
from rotpred.records.log import RunLog

_CONTEXT = multiprocessing.get_context("forkserver")
# Importable without the path of the tests, which Python 3.11 does not pass to the server.
_PROTOCOLS = (
    *("detection", "finetune", "knn", "linear"),
    *("pretrain", "rotation", "segmentation", "svm"),
)
_CONTEXT.set_forkserver_preload(
    [
        *(f"rotpred.protocols.{name}" for name in _PROTOCOLS),
        # What a run imports when it needs it.
        *("rotpred.cli", "matplotlib.backends.backend_agg", "torch.utils.tensorboard.writer"),
    ]
)

LIMIT_SECONDS = 100
ROOT = Path(__file__).resolve().parents[2]


def run(
    target: Callable[..., object],
    *args: object,
    console: Path,
    stdout: Path | None = None,
    world: int = 1,
) -> list[int]:
    """Call `target(*args)` in separate processes and wait for them.

    Args:
        target: A function of an importable module; its result is the exit status.
        console: File for stdout and stderr of all processes.
        stdout: File for stdout alone.
        world: Number of processes, connected as by torchrun; 1 sets no environment variables.

    Returns:
        The exit statuses by rank; the negative signal number for a killed process.
    """
    with _environments(world) as environments:
        jobs = []
        for environment in environments:
            job = _CONTEXT.Process(
                target=_child, args=(target, args, stdout or console, console, environment)
            )
            job.start()
            jobs.append(job)
        try:
            for job in jobs:
                job.join(LIMIT_SECONDS)
            return [_status(job) for job in jobs]
        finally:
            for job in jobs:
                job.kill()


def script(path: Path, args: Sequence[str]) -> None:
    """A program as a function; torch and the protocols are already imported."""
    sys.argv = [str(path), *args]
    runpy.run_path(str(path), run_name="__main__")


def pretrain(args: Sequence[str]) -> int:
    """scripts/pretrain.py as a function."""
    return cli.pretrain_main(args)


def evaluate(args: Sequence[str]) -> int:
    """scripts/evaluate.py as a function."""
    return cli.evaluate_main(args)


def pretrain_and_signal(args: Sequence[str], step: int, number: signal.Signals) -> int:
    """Pretrain, and send this signal to the process of rank 0 after the given step."""
    tick = RunLog.tick

    def tick_and_signal(log: RunLog, now: int) -> None:
        tick(log, now)
        if now == step and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), number)

    RunLog.tick = tick_and_signal  # type: ignore[method-assign]
    return cli.pretrain_main(args)


def torchrun(
    tmp_path: Path, program: str, *, limit_seconds: float = 90
) -> subprocess.CompletedProcess[str]:
    """Run this program text on two processes under torchrun; its argument is the folder."""
    script = tmp_path / "program.py"
    script.write_text(program)
    env = {
        k: v for k, v in os.environ.items() if k not in (*distributed.VARIABLES, "OMP_NUM_THREADS")
    }
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(script), str(tmp_path)],
        env=env, capture_output=True, text=True, timeout=limit_seconds, check=False,
    )  # fmt: skip


@contextlib.contextmanager
def _environments(world: int) -> Iterator[list[dict[str, str]]]:
    if world == 1:
        yield [{}]
        return
    # Port 0: the system chooses a free port, which nobody else can take before it is used.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    yield [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def _child(
    target: Callable[..., object],
    args: Sequence[object],
    stdout: Path,
    stderr: Path,
    more: dict[str, str],
) -> None:
    os.environ.update({"OMP_NUM_THREADS": "1"} | more)
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    sys.exit(target(*args))  # type: ignore[arg-type]


def _status(job: ForkServerProcess) -> int:
    if job.exitcode is None:
        raise TimeoutError(f"process {job.pid} has not ended within {LIMIT_SECONDS} s")
    return job.exitcode
