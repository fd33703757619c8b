"""Throughput of every engine on every container: the same samples, crops and flips for all.

    python benchmarks/loaders.py train.beton folder/ --engines ffcv dali --output loaders.jsonl

Each engine runs in a process of its own; their windows alternate (ABBA), and a window's clock
starts a few batches after its engine. Beside the speed stand what it cost in CPU time and memory,
how long the first batch and the change of epochs take, and how far the pixels are from a reference
(Pillow's decoder and an antialiased resize of the same boxes): a faster loader that aliases is not
the same loader. A beton that fits into memory is read from there after the first pass. The first
batch's latency includes opening the data, not importing the engine; FFCV's holds seconds of
compilation where numba's cache is cold. Warm starts, of fresh processes with their imports, have
rows of their own.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from data.photographs import PHOTOGRAPHS, containers
from harness.plots import bars
from harness.results import Row, Timing, image_row, publish, row, say, start
from harness.runner import Contestant, compete

from pipelines.engines.choice import choose_engine, missing_engines
from pipelines.spec import LoaderSpec, Precision

Name = Literal["ffcv", "dali", "folder", "synthetic"]
Output = Literal["crops", "rotate4", "plain"]
ALL: tuple[Name, ...] = ("ffcv", "dali", "folder")
COLUMNS = (
    "cpu_seconds_per_1k_images",
    "first_batch_seconds",
    "epoch_gap_seconds",
    "rss_mib",
    "pixel_difference",
    "pixel_bias",
    "target",
    "met",
)
START_SECONDS = 3.0
"""From the start of a process to its first batch, at most."""


@dataclass(frozen=True)
class Arguments(Timing):
    """Loader throughput of the engines: JSON lines on stdout, a table on stderr."""

    data: tyro.conf.Positional[tuple[str, ...]] = ()
    """.beton files, folders of images, list files. Without any, `images` are measured in all
    containers: as they are and with their longest side at 500 pixels, as files and in betons with
    and without restart markers."""
    images: str | None = None
    """A folder of JPEG files to make the containers from; without it, photographs are made."""
    folder: Path | None = None
    """Where the containers are put, and found again; a temporary folder by default."""
    engines: tuple[Name, ...] = ()
    """Engines to measure; by default ffcv, dali and folder, as far as they are installed.
    synthetic decodes nothing: the ceiling that transfer and normalisation leave."""
    deliver: Output = "crops"
    """crops: uint8 crops on the host, what engines differ in. rotate4, plain: four normalised views
    of each crop, or one, on the device, as a trainer gets them."""
    size: int = 224
    """Side of the crops in pixels."""
    batch_size: int = 64
    """Source images per batch."""
    precision: Precision = "fp32"
    """Type of the normalised images."""
    workers: int = 0
    """Decoding threads; 0: one for each allowed core."""
    torch_threads: int = 1
    """Threads of torch itself, which normalise where the device is a CPU. More of them wait for
    cores that are busy decoding, and hide what the engines differ in."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where batches go."""
    count: int = PHOTOGRAPHS
    """Photographs that are made where no images are given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.torch_threads < 1 or self.workers < 0:
            raise ValueError("--torch-threads must be at least 1, --workers not negative")


def main(args: Arguments) -> None:
    """Measure, publish; `ValueError` or `OSError` in words."""
    wanted = args.engines or ALL
    # Looking for the two imports them, which takes seconds.
    missing = missing_engines() if {"ffcv", "dali"} & set(wanted) else {}
    refused = [f"{name}: {missing[name]}" for name in args.engines if name in missing]
    if refused:
        raise ValueError(f"--engines: {'; '.join(refused)}")
    for name in (name for name in wanted if name in missing):
        say(f"left out: {name}: {missing[name]}")
    names = tuple(name for name in wanted if name not in missing)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        for data in args.data or _made(args.folder or Path(temporary), args):
            rows += _measure(data, names, args)
    publish(rows, args.output, COLUMNS)
    rates = [r for r in rows if r["unit"] == "images/s"]
    bars(rates, args.plot, title=f"Loaders: {args.deliver} of {args.size} pixels")


def _made(folder: Path, args: Arguments) -> tuple[str, ...]:
    made = containers(args.images, folder, count=args.count)
    original = [made.original(markers=markers) for markers in (False, True)]
    small = [made.small(markers=markers) for markers in (False, True)]
    return tuple(map(str, [made.source, *original, made.small_folder(), *small]))


def _measure(data: str, names: tuple[Name, ...], args: Arguments) -> list[Row]:
    """The rows of one data set."""
    if not Path(data).exists():
        # Here, not in the contestants, which take seconds to import what they need.
        raise ValueError(f"{data}: there is no such file or folder")
    workers = args.workers or len(os.sched_getaffinity(0))
    configs: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(names):
        try:
            choose_engine(LoaderSpec(data=data, engine=name))
        except ValueError as error:
            say(f"left out: {error}")
            continue
        configs[name] = {
            "kind": "ours",
            "data": data,
            "engine": name,
            "output": args.deliver,
            "precision": args.precision,
            "device": args.device,
            "size": args.size,
            "batch_size": args.batch_size,
            "workers": workers,
            "torch_threads": args.torch_threads,
        }
    if not configs:
        raise ValueError(f"{data}: none of these engines can read it: {', '.join(names)}")
    # Synthetic images have no file to compare with.
    untimed = ["served"] + ([] if "synthetic" in configs else ["difference"])
    windows, facts = compete(
        configs,
        repeats=args.repeats,
        seconds=args.seconds,
        questions=("epoch_gap",),
        untimed=untimed,
        title=Path(data).name,
    )
    warm = {name: _warm_starts(name, configs[name], args.repeats) for name in configs}
    # Synthetic images have a size of their own, hence other boxes.
    served = {fact.pop("digest") for name, fact in facts.items() if name != "synthetic"}
    if len(served) > 1:
        raise ValueError(f"{data}: {', '.join(configs)} do not cut the same crops")
    facts.get("synthetic", {}).pop("digest", None)
    variant = f"{Path(data).name} {args.size}px {args.deliver} batch {args.batch_size}"
    variant += f" workers {workers}" + (f" {args.precision}" if args.deliver != "crops" else "")
    device = torch.device(args.device)
    rows = [
        image_row(
            "loaders",
            name,
            variant,
            windows[name],
            views=4 if args.deliver == "rotate4" else 1,
            threads=workers,
            device=device,
            **facts[name],
        )
        for name in configs
    ]
    for name, seconds in warm.items():
        made = row(
            "loaders",
            f"warm start, {name}",
            variant,
            seconds,
            unit="s",
            device=device,
            digits=3,
            order="",
            # The other wait of a trainer, where one epoch ends and the next one begins.
            epoch_gap_seconds=facts[name]["epoch_gap_seconds"],
            target=START_SECONDS,
        )
        rows.append(made | {"met": made["median"] <= START_SECONDS})
    return rows


def _warm_starts(name: str, config: dict[str, Any], repeats: int) -> list[float]:
    """Seconds from the start of a fresh process, its imports included, to its first batch. What is
    compiled lies in the cache, and the data in memory: the contestants have seen to both."""
    say(f"warm starts of {name}")
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        with Contestant(f"warm start, {name}", config) as player:
            player.ask("first_batch")
            taken.append(time.perf_counter() - begin)
    return taken


if __name__ == "__main__":
    start(main, Arguments, "loaders")
