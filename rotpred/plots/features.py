"""What features look like: attention maps, a projection to two dimensions, nearest neighbours.

Functions return figures that nobody shows, as in `figures.py`; equal inputs give equal pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from rotpred.plots.training import ACCENT, INK, MUTED

Images = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

POWERS = (1, 2, 4)
"""Exponents of the maps of the first, the second and all later stages: the higher, the more a few
strong activations count, of which the many channels of late stages have few."""

LEGEND = 20
"""Classes that a legend still tells apart."""


def examples(labels: Ids, count: int) -> list[int]:
    """Choose samples of as many classes as there are, in turn: rising rows, at most `count`.

    Args:
        labels: (N,), class ids, -1 without labels.
        count: how many.
    """
    # The place of each sample within its class; first come all first ones, then all second ones.
    turn = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = labels == label
        turn[members] = np.arange(members.sum())
    order = np.lexsort((labels, turn))
    first = order[turn[order] == 0]
    if len(first) > count:  # spread over the classes rather than the first few of them
        order = first[np.linspace(0, len(first) - 1, count).round().astype(int)]
    return sorted(int(i) for i in order[:count])


def attention(maps: torch.Tensor, *, power: int) -> torch.Tensor:
    """Where a stage is active: the sum over channels of |activation| ** power, free of gradients.

    Source: Zagoruyko and Komodakis, ICLR 2017 (activation-based attention), as used for rotation
    prediction by Gidaris et al., ICLR 2018.

    Args:
        maps: float (N, C, H, W), any device and precision.
        power: of the activations, at least 1.

    Returns:
        float32 (N, H, W) on the CPU, each from 0 to 1; all 0 where a map is the same everywhere.
    """
    size = maps.detach().float().abs().cpu()
    # Relative to the strongest activation, so that no power overflows; scale cancels below.
    size = size / size.amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
    total = size.pow(power).sum(1)
    low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
    span = high - low
    flat = span <= 1e-6 * high
    return torch.where(flat, 0.0, (total - low) / torch.where(flat, 1.0, span))


def attention_grid(images: Images, maps: Sequence[torch.Tensor], *, names: Sequence[str]) -> Figure:
    """Images, one a row, and the attention of every stage laid over them.

    Args:
        images: (N, S, S, 3).
        maps: of each stage, (N, C, H, W).
        names: of the stages.
    """
    colors = matplotlib.colormaps["inferno"]
    side = images.shape[1]
    count, columns = len(images), len(names) + 1
    fig = Figure(figsize=(1.35 * columns, 1.35 * count + 0.5), dpi=120, layout="constrained")
    axes = fig.subplots(count, columns, squeeze=False)
    for column in range(columns):
        shown = images / 255
        title = "image"
        if column:
            power = POWERS[min(column, len(POWERS)) - 1]
            heat = attention(maps[column - 1], power=power)[:, None]
            large = F.interpolate(heat, size=(side, side), mode="bilinear", align_corners=False)
            shown = 0.4 * shown + 0.6 * colors(large[:, 0].numpy())[..., :3]
            title = f"{names[column - 1]}, p = {power}"
        axes[0, column].set_title(title, fontsize=9, color=INK)
        for ax, image in zip(axes[:, column], shown, strict=True):
            ax.imshow(image, interpolation="nearest" if side < 100 else "antialiased")
            ax.set_axis_off()
    return fig


def project(features: Rows) -> tuple[Rows, Rows]:
    """Project to two dimensions by principal components, and by t-SNE of the first 50 of them.

    Args:
        features: (N, D), at least five rows.

    Returns:
        Twice (N, 2).

    Raises:
        ValueError: fewer than five rows.
    """
    count = len(features)
    if count < 5:
        raise ValueError(f"{count} samples are too few to be projected: at least 5")
    # One thread: sums in another order would move the points a little, from run to run.
    with threadpool_limits(1):
        axes = min(50, *features.shape)
        parts = PCA(axes, svd_solver="full").fit_transform(features)
        near = TSNE(
            perplexity=min(30.0, (count - 1) / 3), init="pca", method="exact", random_state=0
        ).fit_transform(parts)
    return np.asarray(parts[:, :2], np.float64), np.asarray(near, np.float64)


def projection(features: Rows, labels: Ids, *, classes: Sequence[str]) -> Figure:
    """Features of a data set as points, colored by class: principal components and t-SNE.

    Args:
        features: (N, D), at least five rows.
        labels: (N,), class ids, -1 without labels.
        classes: names; ids take the place of those that are not there.
    """
    fig = Figure(figsize=(9.2, 4.6), dpi=120, layout="constrained")
    present = np.unique(labels)
    colors = matplotlib.colormaps["tab10" if len(present) <= 10 else "tab20"]
    if len(present) > LEGEND:
        colors = matplotlib.colormaps["hsv"].resampled(len(present) + 1)
    panels = zip(fig.subplots(1, 2), project(features), ("PCA", "t-SNE"), strict=True)
    for ax, points, title in panels:
        for i, label in enumerate(present):
            member = labels == label
            color = MUTED if label < 0 else colors(i)
            name = _name(int(label), classes)
            ax.scatter(*points[member].T, s=9, color=color, label=name, linewidths=0)
        ax.set_title(title, fontsize=10, loc="left", color=INK)
        ax.set_xticks([])
        ax.set_yticks([])
    if len(present) <= LEGEND:
        marks, words = ax.get_legend_handles_labels()
        fig.legend(
            marks, words, loc="outside lower center", ncols=5, fontsize=8, frameon=False,
            markerscale=2,
        )  # fmt: skip
    return fig


def nearest(features: Rows, queries: Sequence[int], *, k: int) -> tuple[Ids, Rows]:
    """Find the other rows with the highest cosine similarity; equal ones: the lower row first.

    Args:
        features: (N, D).
        queries: rows to find neighbours of.
        k: how many, fewer than N.

    Returns:
        Rows (Q, k) and their similarities (Q, k).
    """
    if not 0 < k < len(features):
        raise ValueError(f"{k} neighbours of {len(features) - 1} other samples")
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(lengths, 1e-30)
    similar = unit[list(queries)] @ unit.T
    similar[np.arange(len(queries)), list(queries)] = -np.inf  # not itself
    rows = np.argsort(-similar, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(similar, rows, axis=1)


def retrieval(
    images: Images,
    features: Rows,
    labels: Ids,
    *,
    queries: Sequence[int],
    classes: Sequence[str],
    k: int = 5,
) -> Figure:
    """Images, one a row, and those whose features are nearest, nearest first.

    Args:
        images: (N, S, S, 3).
        features: (N, D).
        labels: (N,), class ids, -1 without labels; neighbours of another class are marked.
        queries: rows that are asked for.
        classes: names; ids take the place of those that are not there.
        k: neighbours shown, fewer where there are fewer.
    """
    k = min(k, len(features) - 1)
    rows, similar = nearest(features, queries, k=k)
    size = (1.35 * (k + 1), 1.6 * len(queries))
    fig = Figure(figsize=size, dpi=120, layout="constrained")
    axes = fig.subplots(len(queries), k + 1, squeeze=False)
    for line, query in enumerate(queries):
        for column, row in enumerate((query, *rows[line])):
            ax, label = axes[line, column], int(labels[row])
            wrong = column > 0 and label != labels[query]
            name = _name(label, classes)[:16]
            title = name if column == 0 else f"{name}\n{similar[line, column - 1]:.2f}"
            ax.set_title(title, fontsize=7, pad=2, color="#b0381f" if wrong else INK)
            small = images.shape[1] < 100
            ax.imshow(images[row], interpolation="nearest" if small else "antialiased")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_color(ACCENT if column == 0 else "#b0381f" if wrong else "white")
            ax.spines[:].set_linewidth(2)
    return fig


def _name(label: int, classes: Sequence[str]) -> str:
    if label < 0:
        return "no label"
    return classes[label] if label < len(classes) else str(label)
