"""Figures of detections and masks: positions of boxes, names and colors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipelines.datasets.annotations import Objects
from pipelines.dense.batch import Target
from rotpred.metrics.detections import ImageDetections
from rotpred.plots.detections import CITYSCAPES_PALETTE, boxes_figure, masks_figure, voc_palette
from rotpred.records.tensorboard import pixels as pixels_of
from tests.support.detections import found

pytestmark = pytest.mark.timeout(60)

CLASSES = ("cat", "dog", "hot dog")
GREY = np.full((120, 160, 3), 128, np.uint8)


def texts(fig: Figure, i: int = 0) -> list[str]:
    return [text.get_text() for text in fig.axes[i].texts]


def frames(fig: Figure, i: int = 0) -> list[Rectangle]:
    patches = [p for p in fig.axes[i].patches if isinstance(p, Rectangle)]
    return [p for p in patches if not p.get_fill() and p.get_edgecolor()[:3] != to_rgb("black")]


def extents(frame: Rectangle) -> tuple[float, ...]:
    """Left, top, right and bottom, in the pixel coordinates of boxes."""
    x, y = frame.get_xy()
    return (x + 0.5, y + 0.5, x + 0.5 + frame.get_width(), y + 0.5 + frame.get_height())


def test_boxes_lie_where_they_were_found() -> None:
    one = found((10, 40, 60, 90, 0, 0.4), (20, 30, 70, 80, 1, 0.7), (90, 30, 150, 110, 0, 0.9))
    truth = Objects(
        np.array([[92, 30, 150, 112]], np.float32),
        np.array([0]), np.zeros(1, bool), np.zeros(1, bool),
    )  # fmt: skip
    fig = boxes_figure([GREY, GREY[:, :100]], [one, found()], CLASSES, truth=[truth, truth])
    assert texts(fig) == ["cat 0.90", "dog 0.70"] and texts(fig, 1) == []
    dashed = [f for f in frames(fig) if f.get_linestyle() != "-"]
    solid = [f for f in frames(fig) if f.get_linestyle() == "-"]
    assert [extents(f) for f in dashed] == [(92, 30, 150, 112)]
    assert [extents(f) for f in solid] == [(90, 30, 150, 110), (20, 30, 70, 80)]
    assert len({f.get_edgecolor() for f in solid}) == 2
    names = [text.get_text() for text in fig.legends[0].get_texts()]
    assert names == ["found (score at least 0.5)", "truth"]
    assert texts(boxes_figure([GREY], [one], CLASSES, min_score=0.0)) == [
        "cat 0.90",
        "dog 0.70",
        "cat 0.40",
    ]
    assert boxes_figure([GREY], [one], CLASSES).legends == []


def test_names_hide_neither_each_other_nor_leave_the_image() -> None:
    # Eight boxes in one corner, and one that fills the image.
    rows = [(100.0 + k, 2.0 + k, 158.0, 60.0 + k, k % 3, 0.9 - k / 50) for k in range(8)]
    fig = boxes_figure([GREY], [found(*rows, (0, 0, 160, 120, 2, 0.95))], CLASSES)
    pixels = pixels_of(fig)
    tags = [p for p in fig.axes[0].patches if isinstance(p, Rectangle) and p.get_fill()]
    assert len(tags) == len(texts(fig)) == 9
    boxes = [extents(tag) for tag in tags]
    for k, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0 and top >= 0 and right <= 160 and bottom <= 120
        for other in boxes[:k]:
            apart = left >= other[2] or right <= other[0] or top >= other[3] or bottom <= other[1]
            assert apart, "two names lie over each other"
    # The names fit into their tags when drawn.
    renderer = fig.canvas.get_renderer()  # type: ignore[attr-defined]
    for tag, text in zip(tags, fig.axes[0].texts, strict=True):
        outer, inner = tag.get_window_extent(renderer), text.get_window_extent(renderer)
        assert outer.x0 <= inner.x0 and inner.x1 <= outer.x1
    assert pixels.shape[2] == 3 and (pixels < 100).any()


def test_masks_tint_their_pixels_only() -> None:
    tools = pytest.importorskip("pycocotools.mask")
    mask = np.zeros((120, 160), np.uint8, order="F")
    mask[30:60, 20:80] = 1
    box = found((20, 30, 80, 60, 1, 0.9))
    runs = tools.encode(mask)
    tinted = ImageDetections(box.boxes, box.labels, box.scores, (runs,))
    target: Target = {
        "boxes": torch.from_numpy(box.boxes),
        "labels": torch.tensor([2]),
        "masks": torch.from_numpy(mask.copy())[None],
    }
    shown = []
    for one in (tinted, target):
        fig = boxes_figure([GREY], [one], CLASSES)
        shown.append(np.asarray(fig.axes[0].get_images()[0].get_array()))
        changed = (shown[-1] != GREY).any(axis=2)
        np.testing.assert_array_equal(changed, mask > 0)
    np.testing.assert_array_equal(*shown)
    assert texts(fig) == ["dog"], "a target has no score"
    assert (shown[0][30, 20:80] != shown[0][45, 50]).any(), "no rim"


def test_masks_in_the_colors_of_their_classes() -> None:
    palette = voc_palette(4)
    truth = np.zeros((40, 60), np.uint8)
    truth[10:20, 10:30] = 2
    truth[:5] = 255
    mine: npt.NDArray[np.uint8] = truth.copy()
    mine[:5], mine[10:20, 10:20] = 0, 3
    names = ("background", *CLASSES)
    image = np.zeros((40, 60, 3), np.uint8)
    fig = masks_figure([image], [mine], [truth], names, palette)
    images = [np.asarray(ax.get_images()[0].get_array()) for ax in fig.axes]
    np.testing.assert_array_equal(images[0], image)
    np.testing.assert_array_equal(images[1], palette[mine])
    np.testing.assert_array_equal(images[2][5:], palette[truth[5:]])
    assert (images[2][:5] == 255).all()
    right = 100 * (1 - 100 / (35 * 60))
    titles = [ax.get_title() for ax in fig.axes]
    assert titles == ["image", f"predicted: {right:.1f} % correct", "truth"]
    legend = [text.get_text() for text in fig.legends[0].get_texts()]
    assert legend == ["background", "dog", "hot dog", "not counted"]
    assert pixels_of(fig).shape[2] == 3


def test_palettes_are_the_published_ones() -> None:
    palette = voc_palette(256)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 8: (64, 0, 0),
             15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}  # fmt: skip
    assert {k: tuple(palette[k].tolist()) for k in known} == known
    assert len({tuple(row) for row in palette.tolist()}) == 256
    assert CITYSCAPES_PALETTE.shape == (19, 3) and CITYSCAPES_PALETTE.dtype == np.uint8
    assert CITYSCAPES_PALETTE[[0, 10, 13]].tolist() == [[128, 64, 128], [70, 130, 180], [0, 0, 142]]


def test_mistakes_are_named() -> None:
    mask = np.zeros((120, 160), np.uint8)
    with pytest.raises(ValueError, match="1 images, but results for"):
        boxes_figure([GREY], [found(), found()], CLASSES)
    with pytest.raises(ValueError, match="0 images"):
        boxes_figure([], [], CLASSES)
    with pytest.raises(ValueError, match="1 images, 0 and 1 masks"):
        masks_figure([GREY], [], [mask], CLASSES, voc_palette())
    with pytest.raises(ValueError, match="2 colors for 3 classes"):
        masks_figure([GREY], [mask], [mask], CLASSES, voc_palette(2))
    with pytest.raises(ValueError, match="of an image"):
        masks_figure([GREY], [mask], [mask[1:]], CLASSES, voc_palette())
