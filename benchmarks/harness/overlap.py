"""Loader alone, training step alone, and both together: windows in ABBA order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import cycle
from typing import TypeVar

import torch

from harness.results import TimingOptions
from harness.timing import WARMUP_BATCHES, Window, abba, window
from pipelines.batch import Batch
from pipelines.dense.batch import DenseBatch
from pipelines.dense.loader import DenseLoader
from pipelines.loader import Loader

B = TypeVar("B", Batch, DenseBatch)

LOADER, STEP, BOTH = WAYS = ("loader alone", "step alone", "both")


def measure_overlap(
    loader: Loader | DenseLoader,
    steps: Callable[[Iterator[B]], Iterator[int]],
    resident: Sequence[B],
    *,
    options: TimingOptions,
    device: torch.device,
) -> tuple[dict[str, list[Window]], dict[str, list[float]]]:
    """Measure the three ways to run.

    Args:
        loader: The loader; every window begins with an epoch of its own.
        steps: Runs a training step per batch, and yields its number of images. Warmed up.
        resident: Batches in device memory that the step alone cycles through.
        options: Number and length of the windows.
        device: Device that trains.

    Returns:
        By way: the windows, and the share of each window that its consumer waited for the loader.
    """
    windows: dict[str, list[Window]] = {way: [] for way in WAYS}
    waits: dict[str, list[float]] = {way: [] for way in (LOADER, BOTH)}
    for number, way in enumerate(abba(WAYS, options.repeats)):
        with closing(_endless(loader, 1000 * number)) as batches:
            work = {
                LOADER: (len(batch.indices) for batch in batches),
                STEP: steps(cycle(resident)),
                BOTH: steps(batches),
            }[way]
            if way in waits:
                for _ in range(WARMUP_BATCHES):
                    next(batches)
            before = loader.wait_seconds
            taken = window(work, seconds=options.seconds, device=device)
            if way in waits:
                waits[way].append((loader.wait_seconds - before) / taken.seconds)
        windows[way].append(taken)
    return windows, waits


def _endless(loader: Loader | DenseLoader, epoch: int) -> Generator[B, None, None]:
    while True:
        yield from loader.epoch(epoch)
        epoch += 1
