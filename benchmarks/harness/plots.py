"""Figures of results: bars with the spread of the windows, and lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from harness.results import Row

OURS, OTHERS = "#2a6f97", "#b0b7bd"


def bars(rows: Sequence[Row], path: Path | None, *, title: str, ours: Sequence[str] = ()) -> None:
    """One bar for each row, as long as its median, with least and most; a mark at its target.

    Args:
        rows: results in the same unit.
        path: the PNG to write; None: nothing.
        title: of the figure.
        ours: beginnings of the names that are drawn in color; empty: all.
    """
    if path is None:
        return
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.42 * len(rows)), layout="constrained")
    names = [f"{r['name']}\n{r['variant']}" for r in rows]
    middles = [r["median"] for r in rows]
    whiskers = [[r["median"] - r["min"] for r in rows], [r["max"] - r["median"] for r in rows]]
    colors = [OURS if not ours or r["name"].startswith(tuple(ours)) else OTHERS for r in rows]
    places = range(len(rows))
    axes.barh(places, middles, xerr=whiskers, color=colors, capsize=2)
    for place, values in zip(places, rows, strict=True):
        if values.get("target") is not None:
            axes.plot([values["target"]] * 2, [place - 0.4, place + 0.4], color="#c1121f", lw=2)
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(rows[0]["unit"])
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def lines(
    curves: dict[str, list[tuple[float, float]]], path: Path | None, *, title: str, x: str, y: str
) -> None:
    """Points joined by lines, both axes logarithmic."""
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
