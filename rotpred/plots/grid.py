"""Figure of a fine-tuning grid search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rotpred.plots.training import INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def grid_figure(
    tops: np.ndarray[Any, np.dtype[np.float64]],
    *,
    lrs: tuple[float, ...],
    head_lr_mults: tuple[float, ...],
) -> Figure:
    """Draw a heat map of accuracies.

    Args:
        tops: float64 (len(lrs), len(head_lr_mults)), in percent; NaN for runs that were not finite.
        lrs: Learning rates.
        head_lr_mults: Factors on the head's learning rate.
    """
    from matplotlib.figure import Figure

    size = (1.8 + 1.2 * len(head_lr_mults), 1.6 + 0.9 * len(lrs))
    fig = Figure(figsize=size, dpi=120, layout="constrained")
    ax = fig.subplots()
    image = ax.imshow(tops, cmap="Blues", aspect="auto")
    low, high = np.nanmin(tops), np.nanmax(tops)
    for (row, column), value in np.ndenumerate(tops):
        lost = np.isnan(value)
        dark = not lost and value > low + 0.6 * (high - low)
        text = "not finite" if lost else f"{value:.2f} %"
        weight = "bold" if value == high else "normal"
        ink = "white" if dark else INK
        ax.text(column, row, text, ha="center", va="center", color=ink, weight=weight)
    ax.set_xticks(range(len(head_lr_mults)), [f"x{mult:g}" for mult in head_lr_mults])
    ax.set_yticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
    ax.set_xlabel("head multiple")
    ax.set_ylabel("learning rate")
    ax.set_title("Top-1 over the validation data", fontsize=11, color=INK)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    fig.colorbar(image, ax=ax, shrink=0.8).outline.set_visible(False)
    return fig
