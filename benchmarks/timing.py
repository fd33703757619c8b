"""Windows of wall and processor time, their order, and rows as JSON lines and as a table."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

import torch

from pipelines.batch import Batch
from pipelines.loader import Loader
from rotpred.runfolder import cpu_model, environment, write_atomic

T = TypeVar("T")

WARMUP_BATCHES = 6
"""Batches that are taken before the clock starts: more than any engine keeps prepared, so that a
window holds no batch that was decoded before it began."""


class Window(NamedTuple):
    """What one stretch of time delivered."""

    images: int
    """Decoded sources, not views."""
    seconds: float
    cpu_seconds: float
    """Of all threads of this process, user and system."""


def abba(names: Sequence[T], repeats: int) -> list[T]:
    """Every name `repeats` times: forwards, backwards, forwards, ...

    A machine that slows down (heat, neighbours) then does not favour whoever comes first.
    """
    return [name for k in range(repeats) for name in (names if k % 2 == 0 else reversed(names))]


def endless(loader: Loader, *, epoch: int) -> Generator[Batch, None, None]:
    """Batches from an epoch on, one epoch after the other; close it to stop the engine."""
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def window(batches: Iterator[Batch], *, seconds: float, device: torch.device) -> Window:
    """Take batches for about `seconds`, and let the device finish what it was given."""
    _finish(device)
    images, cpu, begin = 0, time.process_time(), time.perf_counter()
    for batch in batches:
        images += len(batch.indices)
        if time.perf_counter() - begin >= seconds:
            break
    _finish(device)
    return Window(images, time.perf_counter() - begin, time.process_time() - cpu)


def row(
    benchmark: str,
    *,
    engine: str,
    variant: str,
    windows: Sequence[Window],
    views: int,
    first_batch_seconds: float,
    device: torch.device,
) -> dict[str, object]:
    """One result as it is published; `median`, `min` and `max` are images/s over the windows."""
    rates = [w.images / w.seconds for w in windows]
    middle = median(rates)
    env = environment(device, world=1)
    names = ("python", "torch", "torchvision", "numpy", "ffcv", "dali", "cuda")
    cpu = f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores"
    return {
        "benchmark": benchmark,
        "engine": engine,
        "variant": variant,
        "images_per_s": round(middle, 1),
        "views_per_s": round(views * middle, 1),
        "cpu_seconds_per_1k_images": round(
            median(1e3 * w.cpu_seconds / w.images for w in windows), 4
        ),
        "first_batch_seconds": round(first_batch_seconds, 3),
        "median": round(middle, 1),
        "min": round(min(rates), 1),
        "max": round(max(rates), 1),
        "repeats": len(windows),
        "device": f"{env['device']}, {cpu}" if device.type == "cuda" else cpu,
        "versions": {name: env[name] for name in names if env.get(name) is not None},
    }


def publish(rows: Sequence[dict[str, object]], output: Path | None) -> None:
    """Write the rows as JSON lines to a file (whole or not at all) or to standard output."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if output is None:
        sys.stdout.write(text)
    else:
        write_atomic(output, text.encode())


def table(rows: Sequence[dict[str, object]]) -> str:
    """The rows for a reader."""
    columns = {
        "variant": "variant",
        "engine": "engine",
        "images_per_s": "images/s",
        "min": "min",
        "max": "max",
        "views_per_s": "views/s",
        "cpu_seconds_per_1k_images": "CPU s/1k",
        "first_batch_seconds": "first batch s",
    }
    formats = {"cpu_seconds_per_1k_images": ".2f", "first_batch_seconds": ".2f"}
    lines = [list(columns.values())]
    for values in rows:
        cells = ((key, values[key]) for key in columns)
        lines.append(
            [v if isinstance(v, str) else format(v, formats.get(k, ",.0f")) for k, v in cells]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k < 2 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
