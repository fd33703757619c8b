"""Throughput of every engine on every container, with the same samples, crops and flips.

    python benchmarks/loaders.py train.beton folder/ --engines ffcv dali --output loaders.jsonl

Each engine runs in its own process. Their windows alternate (ABBA), and a window's clock starts a
few batches after its engine. The rows also give CPU time, memory, the time to the first batch and
between epochs, and the pixels' difference to a reference (Pillow's decoder and an antialiased
resize of the same boxes): a faster loader that aliases is not equivalent. A beton that fits into
memory is read from the page cache after the first pass. The time to the first batch includes
opening the data but not importing the engine; FFCV's includes seconds of compilation if numba's
cache is cold. Warm starts (new processes, imports included) have separate rows.
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
from harness.results import Row, TimingOptions, image_row, log, publish, row, run_program
from harness.runner import ContestantProcess, run_alternating
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
"""Target for the time from the start of a process to its first batch."""


@dataclass(frozen=True)
class Arguments(TimingOptions):
    """Loader throughput of the engines: JSON lines on stdout, a table on stderr."""

    data: tyro.conf.Positional[tuple[str, ...]] = ()
    """.beton files, folders of images, list files. Without any, --images are measured in all
    containers: unchanged and with their longest side at 500 pixels, as files and in betons with
    and without restart markers."""
    images: str | None = None
    """A folder of JPEG files to make the containers from; by default photographs are generated."""
    folder: Path | None = None
    """Folder of the containers, which are reused; by default a temporary one."""
    engines: tuple[Name, ...] = ()
    """Engines to measure; by default ffcv, dali and folder, if installed. synthetic decodes
    nothing: it shows the ceiling set by transfer and normalisation."""
    deliver: Output = "crops"
    """crops: uint8 crops on the host, where engines differ. rotate4, plain: four normalised views
    of each crop, or one, on the device, as in training."""
    size: int = 224
    """Side of the crops in pixels."""
    batch_size: int = 64
    """Source images per batch."""
    precision: Precision = "fp32"
    """Type of the normalised images."""
    workers: int = 0
    """Decoding threads; 0: one per allowed core."""
    torch_threads: int = 1
    """Threads of torch itself, which normalise on a CPU. More threads would wait for cores that
    are busy decoding, and hide the differences between engines."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """The device of the batches."""
    count: int = PHOTOGRAPHS
    """Photographs to generate without --images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.torch_threads < 1 or self.workers < 0:
            raise ValueError("--torch-threads must be at least 1, and --workers at least 0")


def main(args: Arguments) -> None:
    """Measure and publish. User errors raise `ValueError` or `OSError`."""
    wanted = args.engines or ALL
    # Checking for the two imports them, which takes seconds.
    missing = missing_engines() if {"ffcv", "dali"} & set(wanted) else {}
    refused = [f"{name}: {missing[name]}" for name in args.engines if name in missing]
    if refused:
        raise ValueError(f"--engines: {'; '.join(refused)}")
    for name in (name for name in wanted if name in missing):
        log(f"left out: {name}: {missing[name]}")
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
    """Return the rows of one data set."""
    if not Path(data).exists():
        # Checked here, because the contestants' imports take seconds.
        raise ValueError(f"{data}: no such file or folder")
    workers = args.workers or len(os.sched_getaffinity(0))
    configs: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(names):
        try:
            choose_engine(LoaderSpec(data=data, engine=name))
        except ValueError as error:
            log(f"left out: {error}")
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
        raise ValueError(f"{data}: cannot be read by any of these engines: {', '.join(names)}")
    # Synthetic images have no file to compare with.
    parallel_calls = ["crop_digest"] + ([] if "synthetic" in configs else ["difference"])
    windows, facts = run_alternating(
        configs,
        repeats=args.repeats,
        seconds=args.seconds,
        calls=("epoch_gap",),
        parallel_calls=parallel_calls,
        title=Path(data).name,
    )
    warm = {name: _warm_starts(name, configs[name], args.repeats) for name in configs}
    # Synthetic images have another size, hence other crop boxes.
    digests = {fact.pop("digest") for name, fact in facts.items() if name != "synthetic"}
    if len(digests) > 1:
        raise ValueError(f"{data}: {', '.join(configs)} do not make the same crops")
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
            # The other wait in training: between two epochs.
            epoch_gap_seconds=facts[name]["epoch_gap_seconds"],
            target=START_SECONDS,
            better="lower",
        )
        rows.append(made)
    return rows


def _warm_starts(name: str, config: dict[str, Any], repeats: int) -> list[float]:
    """Return the seconds from the start of new processes, imports included, to the first batch.

    The earlier contestants have filled numba's cache and the page cache.
    """
    log(f"warm starts of {name}")
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        with ContestantProcess(f"warm start, {name}", config) as process:
            process.call("first_batch")
            taken.append(time.perf_counter() - begin)
    return taken


if __name__ == "__main__":
    run_program(main, Arguments, "loaders")
