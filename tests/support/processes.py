"""Processes that start at once: forked from a server that has imported the project already.

They are real processes with environment, console, signals and exit status of their own; only the
seconds that an interpreter takes to import torch are paid once for the whole suite.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from torch.distributed import TCPStore

from rotpred import cli
from rotpred.records.log import RunLog

_CONTEXT = multiprocessing.get_context("forkserver")
# Found without the path of the tests, which Python 3.11 does not tell the server.
_CONTEXT.set_forkserver_preload(["rotpred.cli"])

LIMIT_SECONDS = 100


def run(target: Callable[..., object], *args: object, console: Path, world: int = 1) -> list[int]:
    """Call `target(*args)` in processes of their own, to the end.

    Args:
        target: a function of an importable module; what it returns is the exit status.
        console: where both streams of all processes go.
        world: that many processes are told each other as torchrun does; 1: they are told nothing.

    Returns:
        The exit statuses, by rank; minus the signal for what a signal killed.
    """
    with _environments(world) as environments:
        jobs = []
        for environment in environments:
            job = _CONTEXT.Process(target=_child, args=(target, args, console, environment))
            job.start()
            jobs.append(job)
        try:
            for job in jobs:
                job.join(LIMIT_SECONDS)
            return [_status(job) for job in jobs]
        finally:
            for job in jobs:
                job.kill()


def pretrain(args: Sequence[str]) -> int:
    """scripts/pretrain.py without its first lines."""
    return cli.pretrain_main(args)


def evaluate(args: Sequence[str]) -> int:
    """scripts/evaluate.py without its first lines."""
    return cli.evaluate_main(args)


def pretrain_and_signal(args: Sequence[str], step: int, number: signal.Signals) -> int:
    """Pretrain, and send this signal to the process of rank 0 as soon as a step is done."""
    tick = RunLog.tick

    def tick_and_signal(log: RunLog, now: int) -> None:
        tick(log, now)
        if now == step and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), number)

    RunLog.tick = tick_and_signal  # type: ignore[method-assign]
    return cli.pretrain_main(args)


@contextlib.contextmanager
def _environments(world: int) -> Iterator[list[dict[str, str]]]:
    if world == 1:
        yield [{}]
        return
    # Port 0: the system chooses a free one, and nobody else can take it before it is used.
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
    target: Callable[..., object], args: Sequence[object], console: Path, more: dict[str, str]
) -> None:
    os.environ.update({"OMP_NUM_THREADS": "1"} | more)
    file = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    sys.exit(target(*args))  # type: ignore[arg-type]


def _status(job: ForkServerProcess) -> int:
    if job.exitcode is None:
        raise TimeoutError(f"process {job.pid} has not ended within {LIMIT_SECONDS} s")
    return job.exitcode
