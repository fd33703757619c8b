"""Overlap of loader and step: each alone, and both together.

    python benchmarks/end_to_end.py --data train.beton --output end_to_end.jsonl

Overlap efficiency is the rate of both together divided by that of the slower one alone. On a GPU it
should be near 1. On a CPU loader and step share the cores, so at best an image costs the sum of
both; the row contains that bound.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from data.photographs import PHOTOGRAPHS, containers
from harness.overlap import WAYS, measure_overlap
from harness.plots import bars
from harness.results import Row, image_row, publish, row, run_program
from harness.timing import Window
from harness.training_step import (
    WARMUP_STEPS,
    Step,
    TrainingOptions,
    resident_batch,
    run_steps,
)
from pipelines.loader import Loader, open_loader
from pipelines.spec import LoaderSpec, RandomResizedCrop
from rotpred.training.settings import Optim, RunSettings

COLUMNS = ("views_per_s", "cpu_seconds_per_1k_images", "wait_share", "binds")


@dataclass(frozen=True)
class Arguments(TrainingOptions):
    """Training on real data, compared with its loader alone and its step alone."""

    data: str | None = None
    """A beton or folder; by default photographs are generated."""
    threads: int = 0
    """Threads of torch on a CPU; 0: one per allowed core."""
    count: int = PHOTOGRAPHS
    """Photographs to generate without --data."""


def main(args: Arguments) -> None:
    """Measure and publish. User errors raise `ValueError` or `OSError`."""
    threads = args.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    device = torch.device(args.device)
    with ExitStack() as stack:
        data = args.data
        if data is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            data = str(containers(None, Path(folder), count=args.count).small(markers=True))
        spec = LoaderSpec(
            data=data,
            engine=args.engine,
            batch_size=args.batch_size,
            crop=RandomResizedCrop(args.size),
            workers=args.workers,
        )
        loader = stack.enter_context(open_loader(spec, device=device, precision=args.precision))
        windows, waits = _measure(loader, args, device)
    variant = f"{Path(data).name} {args.backbone} {args.size}px batch {args.batch_size}"
    variant += f" {args.precision} engine {loader.engine}"
    rows = [
        image_row(
            "end_to_end",
            name,
            variant,
            windows[name],
            views=4,
            threads=threads,
            device=device,
            # Share of the time that the consumer waits for decoded crops.
            wait_share=waits.get(name),
        )
        for name in windows
    ]
    rows.append(_efficiency(rows, windows, variant, device))
    publish(rows, args.output, COLUMNS)
    bars(rows[:3], args.plot, title=_summary(rows[-1]), ours=("both",))


def _measure(
    loader: Loader, args: Arguments, device: torch.device
) -> tuple[dict[str, list[Window]], dict[str, float]]:
    run = RunSettings(
        device=args.device,
        precision=args.precision,
        compile=args.compile,
        cuda_graph=args.cuda_graph,
    )
    step = Step(args.backbone, run=run, optim=Optim(lr=1e-3), batch_size=args.batch_size)
    resident = resident_batch(
        args.size, args.batch_size, precision=args.precision, device=args.device
    )
    for _ in range(WARMUP_STEPS):
        step(resident)
    windows, waits = measure_overlap(
        loader,
        lambda batches: run_steps(step, batches, device),
        [resident],
        options=args,
        device=device,
    )
    return windows, {way: round(median(shares), 3) for way, shares in waits.items()}


def _efficiency(
    rows: list[Row], windows: dict[str, list[Window]], variant: str, device: torch.device
) -> Row:
    loader, step, _ = (r["median"] for r in rows)
    rates = [[w.images / w.seconds for w in windows[way]] for way in WAYS]
    values = [both / min(a, b) for a, b, both in zip(*rates, strict=True)]
    shared = 1 / (1 / loader + 1 / step) / min(loader, step)
    return row(
        "end_to_end",
        "overlap efficiency",
        variant,
        values,
        unit="x",
        device=device,
        digits=3,
        binds="loader" if loader < step else "step",
        # The efficiency if loader and step alternate on the same cores.
        bound_on_shared_cores=round(shared, 3) if device.type == "cpu" else None,
        target=0.97 if device.type == "cuda" else None,
        better="higher",
    )


def _summary(values: Row) -> str:
    return f"Bottleneck: {values['binds']}; overlap efficiency {values['median']:.2f}"


if __name__ == "__main__":
    run_program(main, Arguments, "end_to_end")
