"""Figures: bar charts with the spread of the windows, and line charts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from harness.results import Row

OURS, OTHERS = "#2a6f97", "#b0b7bd"


def bars(rows: Sequence[Row], path: Path | None, *, title: str, ours: Sequence[str] = ()) -> None:
    """Plot one bar per row: its median, with whiskers at min and max and a mark at its target.

    Args:
        rows: Results in the same unit.
        path: The PNG to write; None writes nothing.
        title: Title of the figure.
        ours: Prefixes of the names that are drawn in color; empty colors all.
    """
    if path is None:
        return
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.42 * len(rows)), layout="constrained")
    names = [f"{r['name']}\n{r['variant']}" for r in rows]
    medians = [r["median"] for r in rows]
    whiskers = [[r["median"] - r["min"] for r in rows], [r["max"] - r["median"] for r in rows]]
    colors = [OURS if not ours or r["name"].startswith(tuple(ours)) else OTHERS for r in rows]
    positions = range(len(rows))
    axes.barh(positions, medians, xerr=whiskers, color=colors, capsize=2)
    for y, values in zip(positions, rows, strict=True):
        if values.get("target") is not None:
            axes.plot([values["target"]] * 2, [y - 0.4, y + 0.4], color="#c1121f", lw=2)
    axes.set_yticks(positions, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(rows[0]["unit"])
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def lines(
    curves: dict[str, list[tuple[float, float]]], path: Path | None, *, title: str, x: str, y: str
) -> None:
    """Plot lines with both axes logarithmic.

    Args:
        curves: Points (x, y) by the name of the line.
        path: The PNG to write; None writes nothing.
        title: Title of the figure.
        x: Label of the x axis.
        y: Label of the y axis.
    """
    if path is None:
        return
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend()
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
