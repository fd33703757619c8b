"""Figures of linear SVM results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rotpred.plots.training import ACCENT, INK
from rotpred.svm.low_shot import ShotResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def class_ap_figure(aps: Mapping[str, npt.NDArray[np.float64]], names: Sequence[str]) -> Figure:
    """Draw bars of the average precision of every class, a row per stage.

    Args:
        aps: By stage: float64 (C,), from 0 to 1; shown in percent.
        names: Names of the C classes.
    """
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7.5, 1.7 * len(aps) + 0.9), dpi=120, layout="constrained")
    axes = fig.subplots(len(aps), 1, squeeze=False, sharex=True)
    for ax, (stage, ap) in zip(axes.flat, aps.items(), strict=True):
        ax.bar(range(len(ap)), 100 * ap, color=ACCENT)
        ax.set_title(f"{stage}: mAP {100 * ap.mean():.2f} %", fontsize=10, loc="left", color=INK)
        ax.set_ylim(0, 100)
        ax.set_ylabel("AP (%)", fontsize=8)
        _plain_axes(ax)
    # Only once, below all rows: they share the x axis.
    ax.set_xticks(range(len(names)), names, rotation=50, ha="right", rotation_mode="anchor")
    ax.set_xlabel("class", fontsize=9)
    return fig


def low_shot_curve(results: Mapping[str, Sequence[ShotResult]], shots: Sequence[int]) -> Figure:
    """Draw mAP against the number of positives per class; error bars are one standard deviation."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(5.6, 3.8), dpi=120, layout="constrained")
    ax = fig.subplots()
    for stage, rows in results.items():
        means, deviations = (
            [100 * getattr(r, name) for r in rows] for name in ("mean", "deviation")
        )
        ax.errorbar(shots, means, deviations, label=stage, marker="o", ms=3, lw=1.5, capsize=2)
    ax.set_xscale("log", base=2)
    ax.set_xticks(shots, [str(k) for k in shots])
    ax.set_xlabel("positives per class", fontsize=9)
    ax.set_ylabel("mAP (%)", fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    _plain_axes(ax)
    return fig


def _plain_axes(ax: Axes) -> None:
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25, lw=0.6, axis="y")
    ax.spines[["top", "right"]].set_visible(False)
