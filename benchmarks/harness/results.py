"""Result rows (JSON lines, table) and the command-line options that all benchmarks share."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

import torch
import tyro

from harness.timing import Window
from pipelines.storage import write_atomic
from rotpred.program import exit_status
from rotpred.records.folder import environment

Row = dict[str, Any]
A = TypeVar("A")
Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class RepeatOptions:
    """Options of every benchmark."""

    repeats: int = 5
    """Windows of each contestant, in ABBA order."""
    output: Path | None = None
    """File for the JSON lines; by default they go to stdout."""
    plot: Path | None = None
    """File for the figure (PNG); by default none is written."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError("--repeats must be at least 1")
        for name in ("output", "plot"):
            path = getattr(self, name)
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"--{name}: {path.parent} is not a folder")


@dataclass(frozen=True)
class TimingOptions(RepeatOptions):
    """Options of a benchmark whose windows have a chosen length."""

    seconds: float = 5.0
    """Minimum length of a window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seconds <= 0:
            raise ValueError("--seconds must be positive")


def spread(values: Sequence[float], digits: int = 1) -> Row:
    """Return median, min and max of the windows, rounded to `digits`, and their number."""
    return {
        "median": round(median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "repeats": len(values),
    }


def row(
    benchmark: str,
    name: str,
    variant: str,
    values: Sequence[float],
    *,
    unit: str,
    device: torch.device,
    digits: int = 1,
    order: str = "ABBA",
    target: float | None = None,
    better: Better | None = None,
    **more: object,
) -> Row:
    """Return one result: median, min and max of the windows, and the machine and versions.

    Args:
        benchmark: Name of the program.
        name: What was measured.
        variant: Data, size and other settings, for the reader.
        values: One per window.
        unit: Unit of the values.
        device: Device that did the work.
        digits: Decimals of the rounded values.
        order: Order in which contestants alternated; empty if they did not.
        target: None if there is none on this machine.
        better: Which medians meet the target; None if it is for another value than the median:
            then `more` gives the field `met`.
        more: Further fields.
    """
    return {
        "benchmark": benchmark,
        "name": name,
        "variant": variant,
        "unit": unit,
        **spread(values, digits),
        "order": order,
        **({} if target is None else {"target": target}),
        **({} if better is None else against(median(values), target, better)),
        **more,
        **_machine(str(device)),
    }


def image_row(
    benchmark: str,
    name: str,
    variant: str,
    windows: Sequence[Window],
    *,
    views: int,
    threads: int,
    device: torch.device,
    **more: object,
) -> Row:
    """Return a result in images/s, with views/s and CPU seconds per thousand images.

    Args:
        benchmark: Name of the program.
        name: What was measured.
        variant: Data, size and other settings, for the reader.
        windows: The contestant's windows.
        views: Views per source image.
        threads: Threads or worker processes that were used.
        device: Device that did the work.
        more: Further fields.
    """
    rates = [w.images / w.seconds for w in windows]
    return row(
        benchmark,
        name,
        variant,
        rates,
        unit="images/s",
        device=device,
        views_per_s=round(views * median(rates), 1),
        cpu_seconds_per_1k_images=round(median(cost(windows)), 4),
        images_per_cpu_second=round(1e3 / median(cost(windows)), 1),
        window_seconds=round(median(w.seconds for w in windows), 2),
        threads=threads,
        **more,
    )


def cost(windows: Sequence[Window]) -> list[float]:
    """Return the CPU seconds per thousand images of each window."""
    return [1e3 * w.cpu_seconds / w.images for w in windows]


def ratio_row(
    benchmark: str,
    name: str,
    ours: Sequence[Window],
    theirs: Sequence[Window],
    *,
    target: float | None,
    device: torch.device,
) -> Row:
    """Return the ratio of images per CPU second, ours / theirs, window by window.

    Each pair of windows comes from the same ABBA round. The machine may slow down between the two,
    as windows of other contestants may lie between them. ABBA order averages this out over the
    rounds; min and max show what remains. Without a target the row is for information only.
    """
    values = [b / a for a, b in zip(cost(ours), cost(theirs), strict=True)]
    return row(
        benchmark,
        name,
        "ratio of images per CPU second",
        values,
        unit="x",
        device=device,
        digits=3,
        target=target,
        better="higher",
    )


def against(value: float, target: float | None, better: Better) -> Row:
    """Return the fields of a row that has a target: `target`, and whether `value` has `met` it.

    Both are None if there is no target on this machine.
    """
    if target is None:
        return {"target": None, "met": None}
    return {"target": target, "met": value >= target if better == "higher" else value <= target}


@functools.cache
def _machine(device: str) -> Row:
    env = environment(torch.device(device), world=1)
    names = ("python", "torch", "torchvision", "numpy", "ffcv", "dali", "cuda")
    return {
        "device": env["device"],
        "cpu": env["cpu"],
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: env[name] for name in names if env.get(name) is not None},
        "git": env["git"],
    }


def publish(rows: Sequence[Row], output: Path | None, columns: Sequence[str] = ()) -> None:
    """Write JSON lines to a file (atomically) or to stdout, and a table to stderr.

    Args:
        rows: The results.
        output: The file; None for stdout.
        columns: Fields that the table shows besides variant, name, median, min, max and unit.
    """
    text = "".join(json.dumps(values) + "\n" for values in rows)
    if output is None:
        sys.stdout.write(text)
    else:
        write_atomic(output, text.encode())
    log(table(rows, columns))


def table(rows: Sequence[Row], columns: Sequence[str] = ()) -> str:
    """Return the rows as an aligned text table; for `columns` see `publish`."""
    keys = ("variant", "name", "median", "min", "max", "unit", *columns)
    lines = [[key.replace("_", " ") for key in keys]]
    lines += [[_cell(values.get(key)) for key in keys] for values in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 2 <= k < 5 or k > 5 else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def log(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr)


def run_program(main: Callable[[A], int | None], arguments: type[A], name: str) -> None:
    """Parse the command line, run `main` and exit with the status of `exit_status`."""
    sys.exit(exit_status(name, lambda: main(tyro.cli(arguments))))
