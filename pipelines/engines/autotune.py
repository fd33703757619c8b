"""Number of decoding threads: a share of the cores, then the fewest threads that are as fast.

Busy cores slow down the thread that launches kernels, so decoding gets only a share of the cores if
there is a GPU. Threads that add no speed (because memory, a lock or a disk is the limit) are not
started. The number of threads changes no sample, no crop and no pixel.
"""

from __future__ import annotations

import logging
import math
import os
import time
from typing import NamedTuple

import torch

from pipelines.engines.source import Source, Tunable
from pipelines.spec import LoaderSpec, Shard

log = logging.getLogger(__name__)

_GPU_SHARE = 0.4
"""Share of the cores for decoding beside a GPU. With more, kernel launches wait for a core."""
_ENOUGH = 0.95  # fraction of the best rate that fewer threads must reach
_COLD = 0.8  # a first reading below this fraction of the second one waited for a disk
_SLICE_SECONDS = 0.2  # minimum length of a trial
_TOTAL_SECONDS = 2.0  # no trial starts that would end later
_LEAST_SAMPLES = 10_000  # per epoch; a smaller epoch ends before a trial pays off


class Budget(NamedTuple):
    """Maximum number of decoding threads in this process, and how it was computed."""

    threads: int
    share: float
    """Share of the allowed cores, for all local processes together."""
    cores: int
    """Number of cores that this process may run on."""
    processes: int
    """Number of local processes that share them."""

    def __str__(self) -> str:
        among = f" among {self.processes} processes" if self.processes > 1 else ""
        return f"{self.threads} ({self.share:g} of {self.cores} cores{among})"


def thread_budget(spec: LoaderSpec, shard: Shard, device: torch.device) -> Budget:
    """Return the maximum number of decoding threads in this process, at least one.

    The available cores are those of the affinity mask, which job schedulers and containers narrow.
    """
    share = spec.cpu_budget
    if share is None:
        share = _GPU_SHARE if device.type == "cuda" else 1.0
    cores = len(os.sched_getaffinity(0))
    # The epsilon makes 0.29 of 100 cores 29, despite rounding.
    threads = max(1, math.floor(share * cores / shard.local_world + 1e-9))
    return Budget(threads, share, cores, shard.local_world)


def autotune(source: Source, spec: LoaderSpec, limit: Budget) -> None:
    """Set an engine to the fewest threads that are as fast as the whole budget.

    Decodes the first batches of an epoch and discards them: with the budget, half of it, and so on,
    until the rate drops. Takes about two seconds at most, plus the cost of a first batch. Logs one
    line.

    Args:
        source: The engine, opened with `limit.threads`.
        spec: Gives the batch size.
        limit: The budget.
    """
    if limit.threads == 1:
        reason = "the whole budget"
    elif not isinstance(source, Tunable):
        reason = "the whole budget: this engine's threads are fixed when it is opened"
    elif len(source) < 3 or len(source) * spec.batch_size < _LEAST_SAMPLES:
        reason = "the whole budget: the epoch is too short for trials"
    else:
        source.decode_errors.paused = True
        try:
            source.workers, reason = _choose(source, spec.batch_size, limit.threads)
        finally:
            source.decode_errors.paused = False
        log.info("decoding threads: %d of a budget of %s; %s", source.workers, limit, reason)
        return
    log.info("decoding threads: %s, %s", limit, reason)


def _choose(source: Tunable, batch: int, threads: int) -> tuple[int, str]:
    """Return the number of threads, and the measured rates as text."""
    begin = time.perf_counter()
    cold = _rate(source, batch)
    if 2 * batch / cold > _TOTAL_SECONDS / 2:
        return threads, f"a batch takes {batch / cold:.1f} s, too long for trials"
    rates: dict[int, float] = {}
    while True:
        source.workers = threads
        start = time.perf_counter()
        rates[threads] = _rate(source, batch)
        now = time.perf_counter()
        # The next trial, with half as many threads, may take twice as long.
        late = now + 2 * (now - start) > begin + _TOTAL_SECONDS
        if late or threads == 1 or rates[threads] < _ENOUGH * max(rates.values()):
            break
        threads //= 2
    most = max(rates)
    measured = "images/s: " + ", ".join(f"{r:.0f} with {n}" for n, r in rates.items())
    if cold < _COLD * rates[most]:
        return most, f"{measured}; all of them, because the first reading ran at {cold:.0f}"
    best = max(rates.values())
    return min(n for n, rate in rates.items() if rate >= _ENOUGH * best), measured


def _rate(source: Tunable, batch: int) -> float:
    """Return images per second at the start of an epoch, after its first batch."""
    batches = source.epoch(0)
    try:
        next(batches)
        begin = time.perf_counter()
        images, seconds = 0, 0.0
        while seconds < _SLICE_SECONDS and next(batches, None) is not None:
            images += batch
            seconds = time.perf_counter() - begin
        return images / seconds
    finally:
        batches.close()
