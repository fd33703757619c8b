"""How many threads decode: a share of the cores, and no more of it than makes a difference.

Busy cores slow the thread that launches kernels, so beside a GPU decoding gets a share of them, and
threads that add nothing (memory, a lock or a disk is the limit) are not started. The number of
threads changes no sample, no crop and no pixel.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Generator, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from pipelines.batch import RawBatch
from pipelines.engines.source import DecodeErrors
from pipelines.spec import LoaderSpec, Shard

log = logging.getLogger(__name__)

_BESIDE_A_GPU = 0.4
"""Share of the cores for decoding: with more, launches wait for a core."""
_ENOUGH = 0.95  # of the best rate: what fewer threads must reach to be taken
_COLD = 0.8  # of the rate of a second reading: below, the first one waited for a disk
_SLICE_SECONDS = 0.2  # length of a trial, at least
_TOTAL_SECONDS = 2.0  # no trial begins that would end later
_LEAST_SAMPLES = 10_000  # in an epoch: a smaller one is over before a trial pays


class Budget(NamedTuple):
    """The most threads that decoding in this process may use, and why."""

    threads: int
    share: float
    """Of the allowed cores, for all local processes together."""
    cores: int
    """That this process may run on."""
    processes: int
    """That share them."""

    def __str__(self) -> str:
        among = f" among {self.processes} processes" if self.processes > 1 else ""
        return f"{self.threads} ({self.share:g} of {self.cores} cores{among})"


@runtime_checkable
class Tunable(Protocol):
    """A `pipelines.engines.source.Source` whose number of threads can be changed between epochs."""

    bad: DecodeErrors
    workers: int

    def __len__(self) -> int:
        """Steps per epoch."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        """As `pipelines.engines.source.Source.epoch`."""


class _Ignored(DecodeErrors):
    """Trials mask what cannot be decoded, but neither count it nor name it: the epoch will."""

    def __init__(self) -> None:
        super().__init__(0)

    def report(self, name: str, reason: str) -> None:
        """Nothing."""


def thread_budget(spec: LoaderSpec, shard: Shard, device: torch.device) -> Budget:
    """Threads for decoding in this process, at least one.

    The allowed cores are those of the affinity mask, which job schedulers and containers narrow.
    """
    share = spec.cpu_budget
    if share is None:
        share = _BESIDE_A_GPU if device.type == "cuda" else 1.0
    cores = len(os.sched_getaffinity(0))
    # A little more, so that 0.29 of 100 cores is 29 in floating point, too.
    threads = max(1, math.floor(share * cores / shard.local_world + 1e-9))
    return Budget(threads, share, cores, shard.local_world)


def autotune(source: object, spec: LoaderSpec, limit: Budget) -> None:
    """Give an engine, built with the whole budget, the fewest threads that are as fast.

    Decodes the first batches of an epoch, and throws them away: with the budget, half of it, and so
    on, as long as the rate holds. Takes about two seconds at most, besides what a first batch costs
    anyway, and logs one line.
    """
    if limit.threads == 1:
        reason = "the whole budget"
    elif not isinstance(source, Tunable):
        reason = "the whole budget: this engine's threads are fixed when it is opened"
    elif len(source) < 3 or len(source) * spec.batch_size < _LEAST_SAMPLES:
        reason = "the whole budget: the epoch is too short for trials"
    else:
        kept, source.bad = source.bad, _Ignored()
        try:
            source.workers, reason = _choose(source, spec.batch_size, limit.threads)
        finally:
            source.bad = kept
        log.info("decoding threads: %d of a budget of %s; %s", source.workers, limit, reason)
        return
    log.info("decoding threads: %s, %s", limit, reason)


def _choose(source: Tunable, batch: int, threads: int) -> tuple[int, str]:
    """The number of threads, and what was measured."""
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
        # Half as many threads may take twice as long.
        late = now + 2 * (now - start) > begin + _TOTAL_SECONDS
        if late or threads == 1 or rates[threads] < _ENOUGH * max(rates.values()):
            break
        threads //= 2
    most = max(rates)
    measured = "images/s: " + ", ".join(f"{r:.0f} with {n}" for n, r in rates.items())
    if cold < _COLD * rates[most]:
        return most, f"{measured}; all of them, as the first reading ran at {cold:.0f}"
    best = max(rates.values())
    return min(n for n, rate in rates.items() if rate >= _ENOUGH * best), measured


def _rate(source: Tunable, batch: int) -> float:
    """Images per second at the beginning of an epoch, after its first batch."""
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
        assert isinstance(batches, Generator)
        batches.close()
