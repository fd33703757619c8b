"""What grows with the number of samples: opening, an epoch's order, memory. No pixels.

    python benchmarks/scale.py --samples 1000 1300000 14000000 --output scale.jsonl

Betons with tables of full size and holes for images are made on the spot (72 bytes of disk a
sample, with the side file of segments). Every measurement has a process of its own. With 14 million
samples (ImageNet-22k) the targets are 3 s to open, 2 s for an order, 1 GB of resident memory (of a
process that has not imported torch, which alone takes several hundred MB).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from data.sparse_beton import write_sparse
from harness.plots import lines
from harness.results import Repeated, Row, publish, row, start
from harness.runner import Contestant
from tqdm import tqdm

BATCH_SIZE = 256
FULL = 14_000_000
MEASURES = {
    "open": ("open_seconds", "s", 3.0),
    "order of an epoch": ("order_seconds", "s", 2.0),
    "peak memory": ("peak_rss_mib", "MiB", 1e9 / 2**20),
    "memory above that of the imports": ("added_mib", "MiB", None),
}


@dataclass(frozen=True)
class Arguments(Repeated):
    """Opening time, order time and memory of betons of any length."""

    repeats: int = 5
    """Processes for each length, one after the other."""

    samples: tuple[int, ...] = (1_000, 100_000, 1_300_000, FULL)
    """Lengths. The longest is measured once: it takes as long as all others."""
    folder: Path | None = None
    """Where the betons are made and removed again; a temporary folder by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.samples or min(self.samples) < BATCH_SIZE:
            raise ValueError(f"--samples must be at least {BATCH_SIZE}, a batch")


def main(args: Arguments) -> None:
    """Measure, publish; `ValueError` or `OSError` in words."""
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
        with Contestant(f"{samples} samples", {"kind": "opened", "data": str(path)}) as process:
            taken.append(process.ask("measure", batch_size=BATCH_SIZE))
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
            made |= {"target": round(target, 1), "met": made["median"] <= target}
        rows.append(made)
    return rows


if __name__ == "__main__":
    start(main, Arguments, "scale")
