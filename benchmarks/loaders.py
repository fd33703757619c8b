"""Throughput of every engine on every data set: the same samples, crops and flips for all.

    python benchmarks/loaders.py train.beton other.beton --engines ffcv dali --output loaders.jsonl

What is timed is what a trainer gets: decoded, cropped, moved to the device, turned, normalised. The
windows of the engines alternate (ABBA), each window begins with an epoch of its own and starts its
clock a few batches later. A beton that fits into memory is read from there after the first pass.
The first batch's latency includes opening the data, not importing the engine; FFCV's holds seconds
of compilation where numba's cache is cold.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from timing import WARMUP_BATCHES, Window, abba, endless, publish, row, table, window
from tqdm import tqdm

from pipelines.convert import write_beton
from pipelines.decode import ImageError
from pipelines.images import MemoryImages, from_digits
from pipelines.loader import Loader, choose_engine, missing_engines, open_loader
from pipelines.spec import LoaderSpec, Precision, RandomResizedCrop

Name = Literal["ffcv", "dali", "folder", "synthetic"]
ALL: tuple[Name, ...] = ("ffcv", "dali", "folder")
DIGITS_COPIES = 4


@dataclass(frozen=True)
class Arguments:
    """Loader throughput of the engines: JSON lines on stdout, a table on stderr."""

    data: tyro.conf.Positional[tuple[str, ...]] = ()
    """.beton files, folders of images, list files. Without any, a small beton of handwritten
    digits is made in a temporary folder."""
    engines: tuple[Name, ...] = ()
    """Engines to measure; by default ffcv, dali and folder, as far as they are installed.
    synthetic decodes nothing: the ceiling that transfer and normalisation leave."""
    size: int = 224
    """Side of the crops in pixels."""
    repeats: int = 5
    """Windows of each engine on each data set."""
    seconds: float = 5.0
    """Length of a window."""
    batch_size: int = 64
    """Source images per batch."""
    views: Literal["rotate4", "plain"] = "rotate4"
    """rotate4 makes four views of each crop; plain one."""
    precision: Precision = "fp32"
    """Type of the normalised images."""
    workers: int = 0
    """Decoding threads; 0: one for each allowed core."""
    torch_threads: int = 1
    """Threads of torch itself, which normalise where the device is a CPU. More of them wait for
    cores that are busy decoding, and hide what the engines differ in."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where batches go."""
    output: Path | None = None
    """File for the JSON lines, in place of stdout."""


def main(args: Arguments) -> None:
    """Measure, publish; `ValueError` or `OSError` in words."""
    if args.repeats < 1 or args.torch_threads < 1 or args.seconds <= 0:
        raise ValueError("--repeats and --torch-threads must be at least 1, --seconds positive")
    if args.output is not None and not args.output.parent.is_dir():
        raise ValueError(f"--output: {args.output.parent} is not a folder")
    torch.set_num_threads(args.torch_threads)
    wanted = args.engines or ALL
    # Looking for the two imports them, which takes seconds.
    missing = missing_engines() if {"ffcv", "dali"} & set(wanted) else {}
    refused = [f"{name}: {missing[name]}" for name in args.engines if name in missing]
    if refused:
        raise ValueError(f"--engines: {'; '.join(refused)}")
    for name in ALL if not args.engines else ():
        if name in missing:
            _say(f"left out: {name}: {missing[name]}")
    names = tuple(name for name in wanted if name not in missing)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for data in args.data or (_digits(Path(folder)),):
            rows += _measure(data, names, args)
    publish(rows, args.output)
    _say(table(rows))


def _measure(data: str, names: tuple[Name, ...], args: Arguments) -> list[dict[str, object]]:
    """The rows of one data set."""
    device = torch.device(args.device)
    specs: dict[Name, LoaderSpec] = {}
    for name in dict.fromkeys(names):
        spec = LoaderSpec(
            data=data,
            engine=name,
            batch_size=args.batch_size,
            crop=RandomResizedCrop(size=args.size),
            views=args.views,
            workers=args.workers,
        )
        try:
            choose_engine(spec)
        except ValueError as error:
            _say(f"left out: {error}")
            continue
        specs[name] = spec
    if not specs:
        raise ValueError(f"{data}: none of these engines can read it: {', '.join(names)}")
    with ExitStack() as stack:
        loaders: dict[Name, Loader] = {}
        first: dict[Name, float] = {}
        for name, spec in specs.items():
            begin = time.perf_counter()
            loader = open_loader(spec, device=device, precision=args.precision)
            loaders[name] = stack.enter_context(loader)
            with closing(endless(loader, epoch=0)) as batches:
                next(batches)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                first[name] = time.perf_counter() - begin
        # Synthetic pictures have a size of their own, hence other boxes.
        served = {loader.digest for name, loader in loaders.items() if name != "synthetic"}
        if len(served) > 1:
            raise ValueError(f"{data}: {', '.join(loaders)} do not cut the same crops")
        windows: dict[Name, list[Window]] = {name: [] for name in loaders}
        order = abba(tuple(loaders), args.repeats)
        for name in tqdm(order, desc=Path(data).name, unit="window", leave=False, disable=None):
            epoch = 1 + len(windows[name])
            with closing(endless(loaders[name], epoch=epoch)) as batches:
                for _ in range(WARMUP_BATCHES):
                    next(batches)
                windows[name].append(window(batches, seconds=args.seconds, device=device))
    threads = args.workers or "all"
    variant = f"{Path(data).name} {args.size}px {args.views} {args.precision}"
    variant += f" batch {args.batch_size} workers {threads}"
    if device.type == "cpu" and args.torch_threads > 1:
        variant += f" torch threads {args.torch_threads}"
    return [
        row(
            "loaders",
            engine=name,
            variant=variant,
            windows=windows[name],
            views=specs[name].view_count,
            first_batch_seconds=first[name],
            device=device,
        )
        for name in loaders
    ]


def _digits(folder: Path) -> str:
    """Scikit-learn's digits as a beton, several times over, so that an epoch takes a while."""
    digits = from_digits()
    count = len(digits)
    labels = np.tile(digits.labels, DIGITS_COPIES)
    many = MemoryImages(lambda i: digits.get(i % count), labels, digits.classes, {"data": "digits"})
    path = folder / "digits.beton"
    # One process: the pictures are tiny, and starting others takes longer than encoding them.
    write_beton(many, path, workers=1, check="header")
    return str(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except (ValueError, OSError, ImportError, ImageError) as problem:
        print(f"loaders: {' '.join(str(problem).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
