"""VOC's average precision of detected boxes, at ten overlap thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.arrays import Float64, Int64
from pipelines.datasets.annotations import DenseSamples
from rotpred.metrics.average_precision import average_precision_of
from rotpred.metrics.detections import ImageDetections

OVERLAPS = tuple(percent / 100 for percent in range(50, 100, 5))
"""Thresholds of intersection over union (IoU) that a hit must exceed."""


@dataclass(frozen=True, eq=False)
class ClassAps:
    """AP of every class at every threshold of `OVERLAPS`; shares from 0 to 1."""

    eleven: Float64
    """(C, 10): VOC2007's mean precision at 11 recalls. NaN if no object of the class counts."""
    area: Float64
    """(C, 10): area under the precision envelope, VOC's AP since 2010. NaN as above."""


def voc_metrics(found: Sequence[ImageDetections], samples: DenseSamples) -> dict[str, float]:
    """Return class means of VOC's AP50, AP (over ten overlaps) and AP75; shares from 0 to 1.

    Plain names are VOC2007's 11-point AP; names ending in /area are the area under the precision
    envelope. Classes without an object that counts are left out.

    Args:
        found: One per image, in the order of the data set.
        samples: Ground truth.

    Raises:
        ValueError: As for `class_aps`.
    """
    aps = class_aps(found, samples)
    values = {}
    for ending, table in (("", aps.eleven), ("/area", aps.area)):
        known = table[~np.isnan(table).any(axis=1)]
        values[f"AP50{ending}"] = float(known[:, OVERLAPS.index(0.5)].mean())
        values[f"AP{ending}"] = float(known.mean())
        values[f"AP75{ending}"] = float(known[:, OVERLAPS.index(0.75)].mean())
    return values


def class_aps(found: Sequence[ImageDetections], samples: DenseSamples) -> ClassAps:
    """Compute VOC's AP of each class, as detectron2 does.

    Source: detectron2, detectron2/evaluation/pascal_voc_evaluation.py. Scores are rounded to 3
    decimals and boxes to 1, as in VOC's text files. In order of descending score, each detection is
    matched to the object of its class that it overlaps most. It is correct if the overlap exceeds
    the threshold and the object is not yet matched; it is ignored if the object is difficult.
    Deviations: detections of equal score keep the order of images and detections (detectron2's
    order is unspecified), and recall and overlap are compared exactly, not through rounded sums.

    Args:
        found: One per image, in the order of the data set.
        samples: Ground truth.

    Raises:
        ValueError: The number of images is wrong, a label is not a class, or no object counts.
    """
    n, classes = len(samples), len(samples.classes)
    if len(found) != n:
        raise ValueError(f"detections of {len(found)} images for a data set of {n}")
    truth = [samples.objects(i) for i in range(n)]
    labels, gt_labels = (
        np.concatenate([part.labels for part in parts]) for parts in (found, truth)
    )
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"a detection has a label that is not among the {classes} classes")
    difficult = np.concatenate([t.difficult for t in truth])
    positives = np.bincount(gt_labels[~difficult], minlength=classes)
    if not positives.any():
        raise ValueError("average precision needs an object that is not difficult")
    # Boxes in tenths of a pixel, scores in thousandths: areas are then exact.
    boxes = np.rint(10 * np.concatenate([f.boxes for f in found]).astype(np.float64))
    gt_boxes = 10 * np.concatenate([t.boxes for t in truth]).astype(np.float64)
    scores = np.rint(1000 * np.concatenate([f.scores for f in found]).astype(np.float64))
    # Only boxes of the same class and image are compared: one number for both.
    group = labels * n + np.repeat(np.arange(n), [len(f.labels) for f in found])
    gt_group = gt_labels * n + np.repeat(np.arange(n), [len(t.labels) for t in truth])
    target, overlap = _best_match(boxes, group, gt_boxes, gt_group)

    order = np.lexsort((-scores, labels))
    bounds = np.searchsorted(labels[order], np.arange(classes + 1))
    aps = np.full((2, classes, len(OVERLAPS)), np.nan)
    for c in np.flatnonzero(positives):
        ranked = order[bounds[c] : bounds[c + 1]]
        for k, least in enumerate(OVERLAPS):
            over = overlap[ranked] > least
            ignored = over & difficult[target[ranked]]
            candidates = np.flatnonzero(over & ~ignored)
            first = np.unique(target[ranked[candidates]], return_index=True)[1]
            hits = np.zeros(len(ranked), np.bool_)
            hits[candidates[first]] = True
            aps[:, c, k] = average_precision_of(hits[~ignored], int(positives[c]))
    return ClassAps(eleven=aps[1], area=aps[0])


def _best_match(
    boxes: Float64, group: Int64, gt_boxes: Float64, gt_group: Int64
) -> tuple[Int64, Float64]:
    """Return (M,) objects and (M,) IoUs: the object of its group that each box overlaps most.

    The first such object if several overlap equally; 0 and an IoU of 0 if the group is empty.
    """
    order = np.argsort(gt_group, kind="stable")
    start, stop = (np.searchsorted(gt_group[order], group, side) for side in ("left", "right"))
    counts = stop - start
    # One row per pair of box and object; pairs of one box are adjacent.
    box = np.repeat(np.arange(len(boxes)), counts)
    begin = np.cumsum(counts) - counts
    offset = np.arange(len(box)) - begin[box]
    gt = order[start[box] + offset]
    corner = np.maximum(boxes[box, :2], gt_boxes[gt, :2])
    inside = np.minimum(boxes[box, 2:], gt_boxes[gt, 2:]) - corner
    common = inside.clip(min=0).prod(axis=1)
    area, gt_area = ((b[:, 2:] - b[:, :2]).clip(min=0).prod(axis=1) for b in (boxes, gt_boxes))
    overlap = common / (area[box] + gt_area[gt] - common)

    target, most = np.zeros(len(boxes), np.int64), np.zeros(len(boxes))
    some = np.flatnonzero(counts)
    if len(some):
        most[some] = np.maximum.reduceat(overlap, begin[some])
        candidate = np.where(overlap == most[box], offset, len(gt_boxes))
        target[some] = order[start[some] + np.minimum.reduceat(candidate, begin[some])]
    return target, most
