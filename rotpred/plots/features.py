"""Figures of features: attention maps, two-dimensional projections, nearest neighbours.

Figures are plain, as in `rotpred.plots.training`. Equal inputs give equal pixels.
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
"""Attention exponents of the first, the second and all later stages. Late stages have many channels
with few strong activations; a higher exponent gives those more weight."""

MAX_LEGEND_CLASSES = 20
"""Figures with more classes have no legend."""


def examples(labels: Ids, count: int) -> list[int]:
    """Choose sample rows from as many classes as possible; return at most `count`, ascending.

    Args:
        labels: int64 (N,): class ids, -1 without labels.
        count: Number of samples.
    """
    # Number of each sample within its class: take the first of every class, then the second.
    turn = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = labels == label
        turn[members] = np.arange(members.sum())
    order = np.lexsort((labels, turn))
    first = order[turn[order] == 0]
    if len(first) > count:  # spread over all classes, not just the first few
        order = first[np.linspace(0, len(first) - 1, count).round().astype(int)]
    return sorted(int(i) for i in order[:count])


def attention(feature_map: torch.Tensor, *, power: int) -> torch.Tensor:
    """Return the attention map of a stage: the sum over channels of |activation| ** power.

    Source: Zagoruyko and Komodakis, ICLR 2017 (activation-based attention), as used for rotation
    prediction by Gidaris et al., ICLR 2018.

    Args:
        feature_map: Float (N, C, H, W), any device and precision.
        power: Exponent of the activations, at least 1.

    Returns:
        float32 (N, H, W) on the CPU, without gradient, each scaled to 0..1; all 0 if constant.
    """
    size = feature_map.detach().float().abs().cpu()
    # Relative to the strongest activation, so that no power overflows; the scale cancels below.
    size = size / size.amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
    total = size.pow(power).sum(1)
    low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
    span = high - low
    flat = span <= 1e-6 * high
    return torch.where(flat, 0.0, (total - low) / torch.where(flat, 1.0, span))


def attention_grid(
    images: Images, feature_maps: Sequence[torch.Tensor], *, names: Sequence[str]
) -> Figure:
    """Draw a row per image: the image, and the attention of every stage over it.

    Args:
        images: uint8 (N, S, S, 3).
        feature_maps: One per stage, float (N, C, H, W).
        names: Stage names.
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
            heat = attention(feature_maps[column - 1], power=power)[:, None]
            large = F.interpolate(heat, size=(side, side), mode="bilinear", align_corners=False)
            shown = 0.4 * shown + 0.6 * colors(large[:, 0].numpy())[..., :3]
            title = f"{names[column - 1]}, p = {power}"
        axes[0, column].set_title(title, fontsize=9, color=INK)
        for ax, image in zip(axes[:, column], shown, strict=True):
            ax.imshow(image, interpolation="nearest" if side < 100 else "antialiased")
            ax.set_axis_off()
    return fig


def project(features: Rows) -> tuple[Rows, Rows]:
    """Project to two dimensions by PCA, and by t-SNE of the first 50 principal components.

    Args:
        features: float64 (N, D), at least five rows.

    Returns:
        PCA and t-SNE coordinates, float64 (N, 2) each.

    Raises:
        ValueError: There are fewer than five rows.
    """
    count = len(features)
    if count < 5:
        raise ValueError(f"{count} samples are too few for a projection: at least 5")
    # One thread: another order of summation would move the points slightly between runs.
    with threadpool_limits(1):
        axes = min(50, *features.shape)
        parts = PCA(axes, svd_solver="full").fit_transform(features)
        near = TSNE(
            perplexity=min(30.0, (count - 1) / 3), init="pca", method="exact", random_state=0
        ).fit_transform(parts)
    return np.asarray(parts[:, :2], np.float64), np.asarray(near, np.float64)


def projection(features: Rows, labels: Ids, *, classes: Sequence[str]) -> Figure:
    """Draw features as points colored by class: PCA and t-SNE.

    Args:
        features: float64 (N, D), at least five rows.
        labels: int64 (N,): class ids, -1 without labels.
        classes: Class names; a class without a name is shown by its id.

    Raises:
        ValueError: There are fewer than five rows.
    """
    fig = Figure(figsize=(9.2, 4.6), dpi=120, layout="constrained")
    present = np.unique(labels)
    colors = matplotlib.colormaps["tab10" if len(present) <= 10 else "tab20"]
    if len(present) > MAX_LEGEND_CLASSES:
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
    if len(present) <= MAX_LEGEND_CLASSES:
        marks, words = ax.get_legend_handles_labels()
        fig.legend(
            marks, words, loc="outside lower center", ncols=5, fontsize=8, frameon=False,
            markerscale=2,
        )  # fmt: skip
    return fig


def nearest(features: Rows, queries: Sequence[int], *, k: int) -> tuple[Ids, Rows]:
    """Find the other rows with the highest cosine similarity; ties go to the lower row.

    Args:
        features: float64 (N, D).
        queries: Row numbers (Q,) to find neighbours of.
        k: Number of neighbours, below N.

    Returns:
        Row numbers, int64 (Q, k), and similarities, float64 (Q, k).

    Raises:
        ValueError: `k` is not between 1 and N - 1.
    """
    if not 0 < k < len(features):
        raise ValueError(f"{k} neighbours of {len(features) - 1} other samples")
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(lengths, 1e-30)
    similar = unit[list(queries)] @ unit.T
    similar[np.arange(len(queries)), list(queries)] = -np.inf  # exclude the query itself
    rows = np.argsort(-similar, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(similar, rows, axis=1)


def retrieval(
    images: Images,
    features: Rows,
    labels: Ids,
    *,
    queries: Sequence[int],
    classes: Sequence[str],
) -> Figure:
    """Draw a row per query image: the image and its five nearest neighbours, nearest first.

    Args:
        images: uint8 (N, S, S, 3).
        features: float64 (N, D).
        labels: int64 (N,): class ids, -1 without labels; neighbours of another class are marked.
        queries: Row numbers (Q,) of the query images.
        classes: Class names; a class without a name is shown by its id.
    """
    k = min(5, len(features) - 1)
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
