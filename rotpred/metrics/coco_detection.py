"""COCO's average precision of boxes and masks, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from pipelines.datasets.annotations import DenseSamples
from pipelines.datasets.coco import import_pycocotools, merge_polygons, read_run_lengths
from rotpred.metrics.detections import ImageDetections

_NAMES = ("AP", "AP50", "AP75", "AP-small", "AP-medium", "AP-large")
"""Names of the first entries of COCOeval's `stats`."""


def coco_metrics(
    found: Sequence[ImageDetections], samples: DenseSamples, *, masks: bool
) -> dict[str, float]:
    """Return COCO's AP of boxes and, with `masks`, of masks; shares from 0 to 1.

    Names are box/AP (mean over ten overlaps), box/AP50, box/AP75, box/AP-small, box/AP-medium and
    box/AP-large, and the same with mask/. Objects are small below 32 x 32 pixels and large above
    96 x 96; a size that no object has is left out. The area of an object is that of its polygons,
    as in COCO's own files, else of its run lengths, else of its box. Difficult objects, which COCO
    does not have, are ignored like crowds, but each absorbs only one detection.

    Args:
        found: One per image, in the order of the data set; all need masks if `masks`.
        samples: Ground truth; needs outlines if `masks`.
        masks: Whether to evaluate masks as well.

    Raises:
        ValueError: The number of images is wrong, a label is not a class, masks are missing, no
            object counts, or pycocotools is not installed.
    """
    if len(found) != len(samples):
        raise ValueError(f"detections of {len(found)} images for a data set of {len(samples)}")
    for i, one in enumerate(found):
        if len(one.labels) and not 0 <= one.labels.min() <= one.labels.max() < len(samples.classes):
            raise ValueError(f"{samples.names[i]}: a detection's label is not a class")
        if masks and len(one.masks) != len(one.labels):
            raise ValueError(f"{samples.names[i]}: detections without masks")
    truth = _truth(samples, masks=masks)
    values: dict[str, float] = {}
    for kind in ("box", "mask") if masks else ("box",):
        stats = _evaluated(truth, _detections(found, kind), samples, kind)
        if stats[0] < 0:
            raise ValueError("average precision needs an object that is not a crowd")
        values |= {f"{kind}/{name}": v for name, v in zip(_NAMES, stats, strict=False) if v >= 0}
    return values


def _truth(samples: DenseSamples, *, masks: bool) -> list[dict[str, Any]]:
    """Return annotations in pycocotools' format; image and class numbers count from 1."""
    rows: list[dict[str, Any]] = []
    for i in range(len(samples)):
        objects = samples.objects(i)
        height, width = samples.sizes[i].tolist()
        if masks and len(objects.outlines) != len(objects.boxes):
            raise ValueError(f"{samples.names[i]}: the data have no masks of objects")
        for k, label in enumerate(objects.labels.tolist()):
            left, top, right, bottom = objects.boxes[k].astype(float).tolist()
            row = {
                "id": len(rows) + 1,
                "image_id": i + 1,
                "category_id": label + 1,
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": int(objects.crowd[k]),
                "difficult": int(objects.difficult[k]),
            }
            if objects.outlines:
                runs = _runs(objects.outlines[k], height, width)
                row["area"] = _area(objects.outlines[k], runs)
                row["segmentation"] = runs
            rows.append(row)
    return rows


def _runs(outline: Any, height: int, width: int) -> Any:
    """Return the compressed run lengths of an outline."""
    if isinstance(outline, list):
        return merge_polygons(outline, height, width)
    read_run_lengths(outline, height, width)
    if isinstance(outline["counts"], list):
        return import_pycocotools("mask").frPyObjects(outline, height, width)
    return outline


def _area(outline: Any, runs: Any) -> float:
    if not isinstance(outline, list):
        return float(import_pycocotools("mask").area(runs))
    total = 0.0
    for polygon in outline:
        x, y = polygon[::2], polygon[1::2]
        corners = zip(x, y, [*x[1:], x[0]], [*y[1:], y[0]], strict=True)
        total += abs(sum(a * d - c * b for a, b, c, d in corners)) / 2
    return total


def _detections(found: Sequence[ImageDetections], kind: str) -> list[dict[str, Any]]:
    """Return results in pycocotools' format. It computes areas from masks or else from boxes."""
    rows: list[dict[str, Any]] = []
    for i, one in enumerate(found, 1):
        boxes = one.boxes.astype(float).tolist()
        for k, (left, top, right, bottom) in enumerate(boxes):
            shape = (
                {"segmentation": one.masks[k]}
                if kind == "mask"
                else {"bbox": [left, top, right - left, bottom - top]}
            )
            label, score = int(one.labels[k]) + 1, float(one.scores[k])
            rows.append({"image_id": i, "category_id": label, "score": score, **shape})
    return rows


def _evaluated(
    truth: list[dict[str, Any]], detections: list[dict[str, Any]], samples: DenseSamples, kind: str
) -> list[float]:
    """Return COCOeval's twelve numbers; -1 where nothing counts."""
    tools = import_pycocotools("coco")
    ground_truth = tools.COCO()
    ground_truth.dataset = {
        "info": {},
        "images": [
            {"id": i, "height": height, "width": width}
            for i, (height, width) in enumerate(samples.sizes.tolist(), 1)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(samples.classes, 1)],
        "annotations": [dict(row) for row in truth],  # Copies: COCOeval modifies them.
    }
    # It prints each step.
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth.createIndex()
        found = ground_truth.loadRes(detections) if detections else tools.COCO()
        evaluation = import_pycocotools("cocoeval").COCOeval(
            ground_truth, found, "bbox" if kind == "box" else "segm"
        )
        prepare = evaluation._prepare

        def prepare_difficult() -> None:
            prepare()
            for rows in evaluation._gts.values():
                for row in rows:
                    row["ignore"] |= row["difficult"]

        evaluation._prepare = prepare_difficult
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(v) for v in evaluation.stats]
