"""Results as JSON lines and as a table, and what every program's command line has in common."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import tyro

from harness.timing import Window
from pipelines.imaging.decode import ImageError
from rotpred.files import write_atomic
from rotpred.records.folder import environment

Row = dict[str, Any]
A = TypeVar("A", bound="Repeated")


@dataclass(frozen=True)
class Repeated:
    """What every benchmark lets one choose."""

    repeats: int = 5
    """Windows of each contestant, in the order ABBA."""
    output: Path | None = None
    """File for the JSON lines, in place of stdout."""
    plot: Path | None = None
    """File for the figure (PNG); none by default."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError("--repeats must be at least 1")
        for name in ("output", "plot"):
            path = getattr(self, name)
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"--{name}: {path.parent} is not a folder")


@dataclass(frozen=True)
class Timing(Repeated):
    """What a benchmark with windows of a chosen length lets one choose, too."""

    seconds: float = 5.0
    """Length of a window, at least."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seconds <= 0:
            raise ValueError("--seconds must be positive")


def spread(values: Sequence[float], digits: int = 1) -> Row:
    """Median, smallest and largest of the windows."""
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
    **more: object,
) -> Row:
    """One result: the windows' median, least and most in `unit`, and what it was measured with.

    Args:
        benchmark: the program.
        name: what was measured.
        variant: on which data, at which size, in words.
        values: one for each window.
        unit: of the values.
        device: where the work was done.
        digits: of the rounded values.
        order: in which contestants took turns; empty where nobody did.
        more: further fields.
    """
    return {
        "benchmark": benchmark,
        "name": name,
        "variant": variant,
        "unit": unit,
        **spread(values, digits),
        "order": order,
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
    """A result in images/s, with views/s and CPU seconds per thousand images beside it."""
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
    """CPU seconds per thousand images of each window."""
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
    """How many times as many images per CPU second: the k-th window of one against the k-th of the
    other. Both are of the same round of turns; windows of other contestants may lie between them,
    by which the machine may have slowed down. The order of turns evens that out over the rounds,
    and least and most show what is left of it. Without a target the row only informs."""
    values = [b / a for a, b in zip(cost(ours), cost(theirs), strict=True)]
    middle = median(values)
    return row(
        benchmark,
        name,
        "ratio of images per CPU second",
        values,
        unit="x",
        device=device,
        digits=3,
        target=target,
        met=None if target is None else middle >= target,
    )


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
    """Write JSON lines to a file (whole or not at all) or to stdout, and a table to stderr.

    `columns` are fields of the rows that the table shows besides name, variant and the spread.
    """
    text = "".join(json.dumps(values) + "\n" for values in rows)
    if output is None:
        sys.stdout.write(text)
    else:
        write_atomic(output, text.encode())
    say(table(rows, columns))


def table(rows: Sequence[Row], columns: Sequence[str] = ()) -> str:
    """The rows for a reader."""
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


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr)


def start(main: Callable[[A], None], arguments: type[A], name: str) -> None:
    """Run a program: what goes wrong is one line on stderr, and exit status 2."""
    try:
        main(tyro.cli(arguments))
    except (ValueError, OSError, ImportError, ImageError) as problem:
        print(f"{name}: {' '.join(str(problem).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
