"""Scaling with the number of samples: time to open, time for an epoch's order, memory.

    python benchmarks/scale.py --samples 1000 1300000 14000000 --output scale.jsonl

Generates betons with full tables and holes for images (72 bytes of disk per sample, with the side
file of segments). Every measurement runs in its own process. With 14 million samples (ImageNet-22k)
the targets are 3 s to open, 2 s for an order and 1 GB of resident memory (of a process that has not
imported torch, which alone takes several hundred MB).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data.sparse_beton import write_sparse
from harness.plots import lines
from harness.results import RepeatOptions, Row, against, publish, row, run_program
from harness.runner import ContestantProcess

BATCH_SIZE = 256
FULL = 14_000_000
MEASURES = {
    "open": ("open_seconds", "s", 3.0),
    "order of an epoch": ("order_seconds", "s", 2.0),
    "peak memory": ("peak_rss_mib", "MiB", 1e9 / 2**20),
    "memory above that of the imports": ("added_mib", "MiB", None),
}


@dataclass(frozen=True)
class Arguments(RepeatOptions):
    """Opening time, order time and memory of betons of any number of samples."""

    repeats: int = 5
    """Processes for each number of samples, one after another."""

    samples: tuple[int, ...] = (1_000, 100_000, 1_300_000, FULL)
    """Numbers of samples. From 14,000,000 on each is measured once, because it takes so long."""
    folder: Path | None = None
    """Folder for the betons, which are removed afterwards; by default a temporary one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.samples or min(self.samples) < BATCH_SIZE:
            raise ValueError(f"--samples must be at least {BATCH_SIZE}, the batch size")


def main(args: Arguments) -> None:
    """Measure and publish. User errors raise `ValueError` or `OSError`."""
    rows: list[Row] = []
    for samples in sorted(args.samples):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = write_sparse(Path(folder) / "empty.beton", samples)
            rows += _measure(path, samples, 1 if samples >= FULL else args.repeats)
    publish(rows, args.output, ("samples", "target", "met"))
    curves = {
        f"{name} ({unit})": [(r["samples"], r["median"]) for r in rows if r["name"] == name]
        for name, (_, unit, target) in MEASURES.items()
        if target is not None
    }
    lines(curves, args.plot, title="Betons of many samples", x="samples", y="seconds, or MiB")


def _measure(path: Path, samples: int, repeats: int) -> list[Row]:
    taken: list[dict[str, float]] = []
    for _ in tqdm(range(repeats), desc=f"{samples:,}", leave=False, disable=None):
        with ContestantProcess(
            f"{samples} samples", {"kind": "opened", "data": str(path)}
        ) as process:
            taken.append(process.call("measure", batch_size=BATCH_SIZE))
    rows = []
    for name, (key, unit, target) in MEASURES.items():
        values = [answer[key] for answer in taken]
        made = row(
            "scale",
            name,
            f"{samples:,} samples",
            values,
            unit=unit,
            device=torch.device("cpu"),
            digits=4,
            order="",
            samples=samples,
        )
        if target is not None and samples == FULL:
            made |= against(made["median"], round(target, 1), "lower")
        rows.append(made)
    return rows


if __name__ == "__main__":
    run_program(main, Arguments, "scale")
