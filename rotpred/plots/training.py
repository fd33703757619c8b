"""Figures of training runs, for the run folder and TensorBoard.

Functions return plain `matplotlib.figure.Figure` objects: no pyplot, no global state, no display.
`RunLog.figure` renders and saves them. Each imports matplotlib when it draws: it takes half a
second, which a run would spend before its first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from pipelines.batch import IGNORE
from pipelines.spec import Normalize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROTATIONS = ("0°", "90°", "180°", "270°")
"""Class names of rotation prediction; angles are counter-clockwise."""

INK, ACCENT, MUTED = "#222222", "#1f5fa8", "#8a8a8a"


def views_grid(images: torch.Tensor, *, targets: torch.Tensor, normalize: Normalize) -> Figure:
    """Draw the four views of the first eight samples of a batch, titled by their training labels.

    Args:
        images: Float (4*B, 3, S, S), rotation-major, normalised; any device and precision.
        targets: int64 (4*B,), 0 to 3; IGNORE is shown as "masked".
        normalize: The normalisation of the images, which is undone.

    Raises:
        ValueError: The number of images is not a positive multiple of four, or targets differ in
            number.
    """
    from matplotlib.figure import Figure

    rows = len(images)
    if rows == 0 or rows % 4 or len(targets) != rows:
        raise ValueError(f"expected 4*B images and targets, got {rows} and {len(targets)}")
    samples = rows // 4
    n = min(8, samples)
    chosen = torch.tensor([k * samples + i for k in range(4) for i in range(n)])
    shown = images.detach()[chosen.to(images.device)].float().cpu()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (normalize.mean, normalize.std))
    views_NHWC = ((shown * std + mean) / 255).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    labels = targets.detach()[chosen.to(targets.device)].tolist()

    fig = Figure(figsize=(max(3.8, 1.15 * n), 5.7), dpi=120, layout="constrained")
    fig.suptitle("Views and their labels (counter-clockwise)", fontsize=11, color=INK)
    axes = fig.subplots(4, n, squeeze=False)
    for ax, view, label in zip(axes.flat, views_NHWC, labels, strict=True):
        # Small images show their pixels, large ones are smoothly downscaled.
        ax.imshow(view, interpolation="nearest" if len(view) < 100 else "antialiased")
        masked = label == IGNORE
        title = "masked" if masked else ROTATIONS[label]
        ax.set_title(title, fontsize=9, pad=3, color=MUTED if masked else INK)
        ax.set_axis_off()
    return fig


def confusion(counts: torch.Tensor | npt.NDArray[np.int64]) -> Figure:
    """Draw the confusion matrix of rotations: color and large text are shares, small text counts.

    Args:
        counts: Integers (4, 4), row = truth, column = prediction.

    Raises:
        ValueError: The matrix is not (4, 4).
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    matrix = torch.as_tensor(counts).detach().cpu().double().numpy()
    if matrix.shape != (4, 4):
        raise ValueError(f"counts are {matrix.shape}, expected (4, 4)")
    totals = matrix.sum(axis=1, keepdims=True)
    share = np.divide(100 * matrix, totals, out=np.zeros_like(matrix), where=totals > 0)
    right = 100 * matrix.trace() / max(1.0, matrix.sum())

    fig = Figure(figsize=(6.0, 5.4), dpi=120, layout="constrained")
    ax = fig.subplots()
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(share):
        ink = "white" if value > 55 else INK
        ax.text(column, row - 0.08, f"{value:.1f} %", ha="center", va="center", color=ink)
        ax.text(
            *(column, row + 0.22, f"{matrix[row, column]:,.0f}"),
            ha="center",
            va="center",
            color=ink,
            fontsize=7,
        )
    ax.set_xticks(range(4), ROTATIONS)
    ax.set_yticks(range(4), ROTATIONS)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    ax.set_title(f"{right:.1f} % of {matrix.sum():,.0f} correct", fontsize=11, color=INK)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = fig.colorbar(image, ax=ax, shrink=0.8, format=FuncFormatter(lambda v, _: f"{v:.0f} %"))
    bar.outline.set_visible(False)
    return fig


def filters(weight: torch.Tensor) -> Figure:
    """Draw the filters of a first convolution, each scaled to its own range of colors.

    Args:
        weight: Float (O, 3, kh, kw); any device and precision.

    Raises:
        ValueError: The filters do not have three input channels.
    """
    from matplotlib.figure import Figure

    if weight.ndim != 4 or weight.shape[1] != 3:
        raise ValueError(f"weight is {tuple(weight.shape)}, expected (O, 3, kh, kw)")
    count, _, height, width = weight.shape
    w_NHWC = weight.detach().float().cpu().permute(0, 2, 3, 1)
    low, high = w_NHWC.amin((1, 2, 3), keepdim=True), w_NHWC.amax((1, 2, 3), keepdim=True)
    tiles = ((w_NHWC - low) / (high - low).clamp_min(1e-12)).numpy()

    # A full rectangle if the count allows one that is not much wider than high.
    square = int(np.ceil(np.sqrt(count)))
    columns = next((c for c in range(square, 3 * square) if count % c == 0), square)
    rows = -(-count // columns)
    # Enlarged by a whole factor; the gap does not scale with it.
    zoom, gap = max(1, 42 // max(height, width)), 4
    cell = (height * zoom + gap, width * zoom + gap)
    sheet = np.ones((rows * cell[0] + gap, columns * cell[1] + gap, 3), dtype=np.float32)
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * cell[0], gap + i % columns * cell[1]
        large = tile.repeat(zoom, axis=0).repeat(zoom, axis=1)
        sheet[top : top + height * zoom, left : left + width * zoom] = large
    inches = sheet.shape[1] / 110, sheet.shape[0] / 110 + 0.45
    fig = Figure(figsize=(max(3.2, inches[0]), inches[1]), dpi=120, layout="constrained")
    ax = fig.subplots()
    ax.imshow(sheet, interpolation="nearest")
    title = f"First layer: {count} filters, {height}×{width}"
    ax.set_title(title, fontsize=11, color=INK)
    ax.set_axis_off()
    return fig


def curves(rows: Sequence[Mapping[str, object]]) -> Figure:
    """Draw loss, accuracy, learning rate and throughput against the step of a run.

    Args:
        rows: Rows of log.jsonl, from `rotpred.records.folder.read_rows`. A panel whose values were
            never logged is left out; a value that is not finite leaves a gap.

    Raises:
        ValueError: There is nothing to draw.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("no rows to draw: the log is empty")
    panels = {
        "Loss": ("loss",),
        "Accuracy (%)": ("accuracy", "val/accuracy"),
        "Learning rate": ("lr",),
        "Throughput (1/s)": ("views_per_s", "images_per_s"),
    }
    drawn = [
        title
        for title, names in panels.items()
        if any(isinstance(row.get(name), int | float) for row in rows for name in names)
    ]
    if not drawn:
        raise ValueError("no rows to draw: none has a loss, an accuracy, a rate or a throughput")
    columns = min(2, len(drawn))
    lines = -(-len(drawn) // 2)
    fig = Figure(figsize=(4.6 * columns, 2.9 * lines), dpi=120, layout="constrained")
    axes = list(fig.subplots(lines, columns, squeeze=False).flat)
    for ax, title in zip(axes, drawn, strict=False):
        _lines(ax, rows=rows, names=panels[title])
        ax.set_title(title, fontsize=10, loc="left", color=INK)
    for ax in axes[len(drawn) :]:
        ax.set_visible(False)
    return fig


def _lines(ax: Axes, *, rows: Sequence[Mapping[str, object]], names: Sequence[str]) -> None:
    """Draw one panel: a line per name against the step."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for name, color in zip(names, (ACCENT, "#c8641e"), strict=False):
        points = [
            (row["step"], value if isinstance(value := row.get(name), int | float) else np.nan)
            for row in rows
            if name in row
        ]
        if not points:
            continue
        steps, values = np.array(points, dtype=np.float64).T
        # Markers for short runs: a line would not show a single point.
        marker = "o" if len(points) < 30 else ""
        label = name.replace("_per_s", "/s")
        ax.plot(steps, values, color=color, lw=1.5, marker=marker, ms=3, label=label)
    if len(ax.lines) > 1:
        ax.legend(fontsize=8, frameon=False)
        ax.set_ylim(bottom=0)
    if len(rows) == 1:
        ax.set_xlim(steps[0] - 1, steps[0] + 1)
    ax.set_xlabel("step", fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25, lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
