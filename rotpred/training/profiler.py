"""Profile of a few training steps: a trace for TensorBoard or a browser, and a table."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from pipelines.storage import replaced, write_atomic

logger = logging.getLogger(__name__)

WAIT, WARM_UP = 6, 2
"""Steps before the trace: first those that compile, tune and capture, then the profiler's."""

TRACE, TABLE = "train.pt.trace.json", "operators.txt"
"""File names. TensorBoard's profiler plugin looks for *.pt.trace.json."""


@contextlib.contextmanager
def profiled(folder: Path, steps: int, device: torch.device) -> Iterator[Callable[[], None]]:
    """Profile `steps` training steps of the block and write the result to `folder`.

    Args:
        folder: Created if missing.
        steps: Steps to trace, after WAIT + WARM_UP others; 0 for none. If the block ends earlier,
            the steps traced so far are written, or a warning is logged if there are none.
        device: If it is a GPU, its kernels are traced as well.

    Yields:
        A function to call at the end of each step.
    """
    if steps == 0:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=WAIT, warmup=WARM_UP, active=steps, repeat=1)
    write = functools.partial(_write, folder, device)
    count = 0
    # There is one cycle, so nothing accumulates. Without acc_events torch 2.11 warns while it
    # prepares. If warnings are errors, leaving the half-prepared profiler then ends the process.
    with profile(
        activities=activities, schedule=plan, on_trace_ready=write, acc_events=True
    ) as profiler:

        def step() -> None:
            nonlocal count
            count += 1
            profiler.step()

        yield step
    if count <= WAIT + WARM_UP:
        logger.warning("no profile: the run ended within its first %d steps", WAIT + WARM_UP)


def _write(folder: Path, device: torch.device, profiler: profile) -> None:
    order = f"self_{device.type}_time_total"
    try:
        table = profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=40)
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(folder / TRACE) as temporary:
            profiler.export_chrome_trace(str(temporary))
        write_atomic(folder / TABLE, table.encode())
    except (OSError, RuntimeError) as error:  # a failed write never ends a training run
        logger.warning("cannot write the profile: %s", error)
        return
    logger.info("profile of these steps in %s\n%s", folder, table)
