"""A profile of a few training steps: a trace for TensorBoard or a browser, and a table."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from rotpred.files import replaced, write_atomic

logger = logging.getLogger(__name__)

WAIT, WARM_UP = 6, 2
"""Steps before the profile: first those that compile, tune and capture, then the tracer's own."""

TRACE, TABLE = "train.pt.trace.json", "operators.txt"
"""Names that TensorBoard's profiler plugin, chrome://tracing, Perfetto and a person look for."""


@contextlib.contextmanager
def profiled(
    folder: Path, steps: int, device: torch.device, *, wait: int = WAIT, warm_up: int = WARM_UP
) -> Iterator[Callable[[], None]]:
    """Profile `steps` training steps of the block into `folder`; 0 profiles nothing.

    Args:
        folder: made where missing.
        steps: how many are traced, after wait + warm_up others. Where the block ends earlier, what
            has been traced until then is written, or a warning says that nothing has.
        device: kernels are traced as well where it is a GPU.
        wait: steps that cost nothing.
        warm_up: steps that are traced and thrown away.

    Yields:
        What to call at the end of each step.
    """
    if steps == 0:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=wait, warmup=warm_up, active=steps, repeat=1)
    write = functools.partial(_write, folder, device)
    count = 0
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:

        def step() -> None:
            nonlocal count
            count += 1
            profiler.step()

        yield step
    if count <= wait + warm_up:
        logger.warning("no profile: the run ended within its first %d steps", wait + warm_up)


def _write(folder: Path, device: torch.device, profiler: profile) -> None:
    order = f"self_{device.type}_time_total"
    try:
        table = profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=40)
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(folder / TRACE) as temporary:
            profiler.export_chrome_trace(str(temporary))
        write_atomic(folder / TABLE, table.encode())
    except (OSError, RuntimeError) as error:  # as all records: they never end a training run
        logger.warning("cannot write the profile: %s", error)
        return
    logger.info("profile of these steps in %s\n%s", folder, table)
