"""Figures of predictions on images: boxes and masks of objects, classes of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from pipelines.datasets.annotations import IGNORED, Objects
from pipelines.datasets.coco import rasterize
from pipelines.dense.batch import Target
from rotpred.metrics.detections import ImageDetections
from rotpred.plots.training import INK, MUTED

Pixels = npt.NDArray[np.uint8]

CITYSCAPES_PALETTE: Pixels = np.array(
    [
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
        (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
        (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
        (0, 80, 100), (0, 0, 230), (119, 11, 32),
    ],
    np.uint8,
)  # fmt: skip
"""uint8 (19, 3): class colors by train id (cityscapesscripts/helpers/labels.py)."""

_COLORS = (
    "#e6194b", "#0b8f3c", "#2f5fd0", "#c85a00", "#8e1fb0", "#007f87", "#b8007a", "#6b7d00",
    "#7a4a1e", "#005c9e", "#a3192e", "#4a6b3a",
)  # fmt: skip
"""Box colors, dark enough for white text."""
_TRUTH_COLOR = "#ffffff"
_LABEL_FONT = FontProperties(size=7.5, weight="bold")


def voc_palette(n: int = 21) -> Pixels:
    """Return VOC's class colors, uint8 (n, 3): bits of the class number, three at a time."""
    colors = np.zeros((n, 3), np.uint8)
    for number in range(n):
        for bit in range(8):
            for channel in range(3):
                colors[number, channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
    return colors


def boxes_figure(
    images: Sequence[Pixels],
    found: Sequence[ImageDetections | Target],
    classes: Sequence[str],
    *,
    truth: Sequence[Objects] | None = None,
    min_score: float = 0.5,
) -> Figure:
    """Draw images, three in a row, with boxes, names and scores; masks tinted, ground truth dashed.

    Args:
        images: uint8 (h, w, 3) each.
        found: Detections or training targets of each image, in its pixels.
        classes: Class names.
        truth: Ground truth of each image.
        min_score: Detections of a lower score are not drawn.

    Raises:
        ValueError: There are no images, or the numbers of images and results differ.
    """
    others = {len(found), len(truth) if truth is not None else len(found)}
    if len(images) == 0 or others != {len(images)}:
        raise ValueError(f"{len(images)} images, but results for {sorted(others)}")
    sizes = [image.shape[:2] for image in images]
    fig, axes = _grid(sizes, min(3, len(images)), "Detections", foot=truth is not None)
    for i, (ax, image, one) in enumerate(zip(axes, images, found, strict=True)):
        shapes = _shapes(one, classes, min_score, image.shape[:2])
        ax.imshow(_tinted(image, shapes))
        if truth is not None:
            for left, top, right, bottom in truth[i].boxes.tolist():
                # A dark line below, so that the dashes are visible on any background.
                for color, style, width in (("black", "-", 1.8), (_TRUTH_COLOR, (0, (3, 3)), 1.0)):
                    ax.add_patch(_outline((left, top, right, bottom), color, style, width))
        for shape in shapes:
            ax.add_patch(_outline(shape.box, shape.color, "-", 1.8))
        _draw_labels(ax, shapes)
    if truth is not None:
        dashes = Line2D([], [], color=INK, ls=(0, (3, 3)), lw=1.0)
        line = Line2D([], [], color=INK, lw=1.8)
        names = [f"found (score at least {min_score:g})", "truth"]
        fig.legend([line, dashes], names, **_FOOT, ncols=2)
    return fig


def masks_figure(
    images: Sequence[Pixels],
    predicted: Sequence[Pixels],
    truth: Sequence[Pixels],
    classes: Sequence[str],
    palette: Pixels,
) -> Figure:
    """Draw a row per image: image, predicted classes, true classes; with a legend.

    Args:
        images: uint8 (h, w, 3) each.
        predicted: uint8 (h, w) each: classes.
        truth: uint8 (h, w) each: classes, and `IGNORED`, which is drawn white.
        classes: Class names; the legend lists those that occur.
        palette: uint8 (C, 3): class colors.

    Raises:
        ValueError: There are no images, the numbers of images and masks differ, there are too few
            colors, or a mask has another size than its image.
    """
    if len(images) == 0 or not len(images) == len(predicted) == len(truth):
        raise ValueError(f"{len(images)} images, {len(predicted)} and {len(truth)} masks")
    if len(palette) < len(classes):
        raise ValueError(f"{len(palette)} colors for {len(classes)} classes")
    for image, *masks in zip(images, predicted, truth, strict=True):
        if any(mask.shape != image.shape[:2] for mask in masks):
            raise ValueError(f"masks {[m.shape for m in masks]} of an image {image.shape}")
    seen = np.unique(np.concatenate([mask.ravel() for mask in (*predicted, *truth)]))
    table = np.full((256, 3), 255, np.uint8)
    table[: len(classes)] = palette[: len(classes)]
    patches = [
        Patch(facecolor=table[c] / 255, edgecolor=MUTED, lw=0.5, label=classes[c])
        for c in seen
        if c < len(classes)
    ]
    if IGNORED in seen:
        patches.append(Patch(facecolor="white", edgecolor=MUTED, lw=0.5, label="not counted"))
    legend_rows = -(-len(patches) // _LEGEND_COLUMNS)
    shapes = [image.shape[:2] for image in images for _ in range(3)]
    fig, axes = _grid(shapes, 3, "Classes of pixels", foot=legend_rows, captions=True)
    for i, (image, mine, true) in enumerate(zip(images, predicted, truth, strict=True)):
        row = axes[3 * i : 3 * i + 3]
        counted = true != IGNORED
        right = 100 * (mine == true)[counted].mean() if counted.any() else np.nan
        captions = ("image", f"predicted: {right:.1f} % correct", "truth")
        for ax, pixels, caption in zip(
            row, (image, table[mine], table[true]), captions, strict=True
        ):
            ax.imshow(pixels, interpolation="antialiased" if pixels is image else "nearest")
            ax.set_title(caption, fontsize=9, pad=3, color=INK)
    fig.legend(handles=patches, **_FOOT, ncols=min(_LEGEND_COLUMNS, len(patches)))
    return fig


_LEGEND_COLUMNS = 7
_FOOT: dict[str, Any] = {
    "loc": "lower center", "frameon": False, "fontsize": 8, "borderaxespad": 0.3
}  # fmt: skip


class _Shape(NamedTuple):
    """One object to draw."""

    box: tuple[float, float, float, float]
    text: str
    color: str
    mask: npt.NDArray[np.bool_] | None


def _shapes(
    one: ImageDetections | Target, classes: Sequence[str], min_score: float, size: tuple[int, int]
) -> list[_Shape]:
    """Return the objects to draw, by descending score."""
    scores: list[float] | None = None
    if isinstance(one, ImageDetections):
        keep = np.flatnonzero(one.scores >= min_score)
        keep = keep[np.argsort(-one.scores[keep], kind="stable")]
        boxes, labels, scores = one.boxes[keep], one.labels[keep], one.scores[keep].tolist()
        masks = rasterize([one.masks[k] for k in keep], *size) if one.masks else None
    else:
        boxes, labels = one["boxes"].cpu().numpy(), one["labels"].cpu().numpy() - 1
        masks = one["masks"].cpu().numpy() if "masks" in one else None
    shapes = []
    for k, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        text = classes[label] + (f" {scores[k]:.2f}" if scores is not None else "")
        mask = masks[k] > 0 if masks is not None else None
        shapes.append(_Shape(tuple(box), text, _COLORS[label % len(_COLORS)], mask))
    return shapes


def _tinted(image: Pixels, shapes: Sequence[_Shape]) -> Pixels:
    """Return the image with each mask tinted in its color, with a solid outline."""
    result = image.astype(np.float32)
    for shape in shapes:
        if shape.mask is None:
            continue
        color = np.array([int(shape.color[i : i + 2], 16) for i in (1, 3, 5)], np.float32)
        within = np.pad(shape.mask, 1)
        inner = within[:-2, 1:-1] & within[2:, 1:-1] & within[1:-1, :-2] & within[1:-1, 2:]
        result[shape.mask] += 0.4 * (color - result[shape.mask])
        result[shape.mask & ~inner] = color
    return result.round().astype(np.uint8)


def _outline(
    box: tuple[float, float, float, float], color: str, style: Any, width: float
) -> Rectangle:
    left, top, right, bottom = box
    # imshow places the center of the first pixel at 0.
    return Rectangle(
        (left - 0.5, top - 0.5), right - left, bottom - top,
        fill=False, edgecolor=color, lw=width, ls=style, joinstyle="miter",
    )  # fmt: skip


def _draw_labels(ax: Axes, shapes: Sequence[_Shape]) -> None:
    """Label the boxes, outside of them if there is room, without covering other labels."""
    fig = ax.figure
    assert isinstance(fig, Figure)
    renderer = FigureCanvasAgg(fig).get_renderer()  # type: ignore[no-untyped-call]
    height, width = ax.get_images()[0].get_array().shape[:2]  # type: ignore[union-attr]
    per_dot = width / ax.get_window_extent(renderer).width
    taken: list[tuple[float, float, float, float]] = []
    for shape in shapes:
        left, top, right, bottom = shape.box
        dots = renderer.get_text_width_height_descent(shape.text, _LABEL_FONT, ismath=False)
        w, h = (dots[0] + 8) * per_dot, (dots[1] + 6) * per_dot
        places = [
            *((x, y) for y in (top - h, bottom) for x in (left, right - w)),
            *((x, y) for x in (left - w, right) for y in (top, bottom - h)),
            *((x, y) for y in (top, bottom - h) for x in (left, right - w)),
            *((left, y) for y in np.arange(top + h, bottom - h, h)),
        ]
        inside = [(min(max(x, 0), max(width - w, 0)), y) for x, y in places]
        boxes = [(x, y, x + w, y + h) for x, y in inside if 0 <= y <= height - h]
        boxes = boxes or [(inside[0][0], max(0.0, top), inside[0][0] + w, max(0.0, top) + h)]
        # The first place that covers no other label, else the one that covers least.
        place = min(boxes, key=lambda box: sum(_overlap_area(box, other) for other in taken))
        taken.append(place)
        ax.add_patch(
            Rectangle((place[0] - 0.5, place[1] - 0.5), w, h, color=shape.color, lw=0, zorder=3)
        )
        ax.text(
            place[0] + w / 2 - 0.5, place[1] + h / 2 - 0.5, shape.text,
            fontproperties=_LABEL_FONT, color="white", ha="center", va="center_baseline", zorder=4,
        )  # fmt: skip


def _overlap_area(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Return the area of the intersection of two boxes."""
    width, height = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    return max(0.0, width) * max(0.0, height)


def _grid(
    sizes: Sequence[tuple[int, ...]],
    columns: int,
    title: str,
    *,
    foot: int,
    captions: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Create axes in rows of equal height that fill the width, up to a greatest height.

    Positions are fixed in inches, because placing labels needs the scale of each image.
    """
    cell = 3.6 if columns > 1 else 5.0
    gap, head, line = 0.12, 0.42, 0.24
    above = line if captions else 0.0
    rows = [sizes[k : k + columns] for k in range(0, len(sizes), columns)]
    space = columns * cell + (columns - 1) * gap
    heights: list[float] = []
    for row in rows:
        filling = (space - (len(row) - 1) * gap) / sum(w / h for h, w in row)
        # The last row may be short: it must not be higher than the one before.
        most = heights[-1] if heights and len(row) < columns else 1.1 * cell
        heights.append(min(most, filling))
    total = head + sum(heights) + len(rows) * (gap + above) + line * foot + gap
    width = space + 2 * gap
    fig = Figure(figsize=(width, total), dpi=120)
    fig.suptitle(title, fontsize=11, color=INK, y=1 - 0.12 / total, va="top")
    axes = []
    y = total - head
    for row, height in zip(rows, heights, strict=True):
        y -= height + above
        widths = [height * w / h for h, w in row]
        x = (width - sum(widths) - (len(row) - 1) * gap) / 2
        for w in widths:
            ax = fig.add_axes((x / width, y / total, w / width, height / total))
            ax.set_axis_off()
            axes.append(ax)
            x += w + gap
        y -= gap
    return fig, axes
