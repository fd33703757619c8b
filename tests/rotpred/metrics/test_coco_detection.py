"""COCO average precision, against pycocotools run on annotation and result files."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipelines.datasets import coco
from pipelines.datasets.annotations import AnnotationErrors, Objects
from rotpred.metrics.coco_detection import coco_metrics
from rotpred.metrics.detections import ImageDetections

tools: Any = pytest.importorskip("pycocotools.mask")

pytestmark = pytest.mark.timeout(60)

Pixels = npt.NDArray[np.uint8]
IDS = (2, 5, 11)


def outline(draw: np.random.Generator, h: int, w: int, scale: float) -> tuple[list[float], Pixels]:
    """A random rectangle or triangle: its polygon and its mask."""
    left, top = draw.uniform(0, 0.5, 2) * (w, h)
    right, bottom = left + scale * w * 0.45, top + scale * h * 0.45
    polygon = [left, top, right, top, right, bottom]
    if draw.random() < 0.6:
        polygon += [left, bottom]
    polygon = [round(float(v), 2) for v in polygon]
    return polygon, coco.rasterize([[polygon]], h, w)[0]


def files(root: Path, seed: int) -> tuple[Path, Path]:
    """A COCO data set with annotations of all sizes and some crowds, and results for it."""
    draw = np.random.default_rng(seed)
    images, annotations, results = [], [], []
    (root / "val").mkdir(parents=True)
    for number in range(12):
        h, w = (int(v) for v in draw.integers(120, 260, 2))
        image = 900 - 31 * number
        (root / "val" / f"{image:012}.jpg").touch()
        images.append({"id": image, "file_name": f"{image:012}.jpg", "height": h, "width": w})
        for _ in range(int(draw.integers(0, 7))):
            kind = int(draw.choice(IDS))
            polygon, mask = outline(draw, h, w, float(draw.choice([0.1, 0.4, 1.0])))
            x, y = polygon[::2], polygon[1::2]
            box = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
            crowd = draw.random() < 0.15
            area = box[2] * box[3] / (1 if len(x) == 4 else 2)
            segmentation: Any = [polygon]
            if crowd:
                segmentation = tools.encode(np.asfortranarray(mask))
                segmentation["counts"] = segmentation["counts"].decode()
                area = float(mask.sum())
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": kind, "bbox": box,
                 "area": area, "iscrowd": int(crowd), "segmentation": segmentation}
            )  # fmt: skip
            for _ in range(int(draw.integers(0, 4))):
                moved = np.roll(mask, draw.integers(-5, 6, 2), (0, 1))
                runs = tools.encode(np.asfortranarray(moved))
                shaken = np.array(box) * draw.uniform(0.9, 1.1, 4)
                results.append(
                    {"image_id": image, "bbox": np.float32(shaken).tolist(),
                     "category_id": kind if draw.random() < 0.9 else int(draw.choice(IDS)),
                     "score": float(np.float32(draw.random())),
                     "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()}}
                )  # fmt: skip
    (root / "annotations").mkdir()
    truth, found = root / "annotations" / "instances_val.json", root / "found.json"
    categories = [{"id": i, "name": f"kind {i}"} for i in IDS]
    content = {"images": images, "annotations": annotations, "categories": categories}
    truth.write_text(json.dumps(content))
    found.write_text(json.dumps(results))
    return truth, found


def pycocotools_stats(truth: Path, results: Path, kind: str) -> list[float]:
    """The metrics that pycocotools computes."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = pytest.importorskip("pycocotools.coco").COCO(str(truth))
        rows = json.loads(results.read_text())
        if kind == "segm":  # so that areas are those of the masks
            for row in rows:
                del row["bbox"]
        run = pytest.importorskip("pycocotools.cocoeval").COCOeval(gt, gt.loadRes(rows), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [float(v) for v in run.stats]


def as_found(results: Path, samples: coco.CocoSamples) -> list[ImageDetections]:
    """Results by image, converted independently of the product code."""
    rows = json.loads(results.read_text())
    found = []
    for name in samples.names:
        mine = [row for row in rows if row["image_id"] == int(name)]
        box = np.array([row["bbox"] for row in mine], np.float64).reshape(-1, 4)
        box[:, 2:] += box[:, :2]
        found.append(
            ImageDetections(
                boxes=box.astype(np.float32),
                labels=np.array([IDS.index(row["category_id"]) for row in mine], np.int64),
                scores=np.array([row["score"] for row in mine], np.float32),
                masks=tuple(row["segmentation"] for row in mine),
            )
        )
    return found


@pytest.mark.parametrize("seed", range(3))
def test_random_boxes_and_masks_follow_pycocotools(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    truth, results = files(tmp_path, seed)
    samples = coco.index_objects("val", tmp_path, errors=AnnotationErrors(0))
    crowds = [bool(samples.objects(i).crowd.any()) for i in range(len(samples))]
    assert any(crowds), "no crowd in the case"
    values = coco_metrics(as_found(results, samples), samples, masks=True)
    names = ("AP", "AP50", "AP75", "AP-small", "AP-medium", "AP-large")
    assert list(values) == [f"{kind}/{name}" for kind in ("box", "mask") for name in names]
    for kind, theirs in (("box", "bbox"), ("mask", "segm")):
        expected = pycocotools_stats(truth, results, theirs)[:6]
        assert 0.05 < expected[0] < 0.95, "the case is trivial"
        got = [values[f"{kind}/{name}"] for name in names]
        np.testing.assert_allclose(got, expected, atol=1e-9, rtol=0)
    assert capsys.readouterr().out == ""
    assert coco_metrics(as_found(results, samples), samples, masks=False) == {
        name: value for name, value in values.items() if name.startswith("box/")
    }


class Changed:
    """A data set with replaced objects."""

    def __init__(self, samples: coco.CocoSamples, change: Any) -> None:
        self.samples, self.change = samples, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.samples, name)

    def __len__(self) -> int:
        return len(self.samples)

    def objects(self, i: int) -> Objects:
        return self.change(self.samples.objects(i))  # type: ignore[no-any-return]


def test_a_difficult_object_counts_neither_way(tmp_path: Path) -> None:
    samples = coco.index_objects("val", _tree(tmp_path), errors=AnnotationErrors(0))
    found = [
        ImageDetections(
            one.boxes, one.labels, np.linspace(0.9, 0.5, len(one.boxes), dtype=np.float32)
        )
        for one in map(samples.objects, range(len(samples)))
    ]
    assert coco_metrics(found, samples, masks=False)["box/AP"] == pytest.approx(1)
    # Without the first object its detection would be wrong; if it is difficult, it is ignored.
    lacking: Any = Changed(samples, lambda o: replace(o, **{k: v[1:] for k, v in _columns(o)}))
    assert coco_metrics(found, lacking, masks=False)["box/AP"] < 1
    difficult: Any = Changed(samples, lambda o: replace(o, difficult=np.arange(len(o.labels)) == 0))
    assert coco_metrics(found, difficult, masks=False)["box/AP"] == pytest.approx(1)
    silent = [replace(f, **{k: v[1:] for k, v in _columns(f)}) for f in found]
    assert coco_metrics(silent, difficult, masks=False)["box/AP"] == pytest.approx(1)
    assert coco_metrics(silent, samples, masks=False)["box/AP"] < 1


def _tree(base: Path) -> Path:
    files(base, 5)
    return base


def _columns(one: Objects | ImageDetections) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(one).items() if len(value)]


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, results = files(tmp_path, 5)
    samples = coco.index_objects("val", tmp_path, errors=AnnotationErrors(0))
    found = as_found(results, samples)
    first = next(i for i, one in enumerate(found) if len(one.labels))
    name = samples.names[first]
    with pytest.raises(ValueError, match="11 images for a data set of 12"):
        coco_metrics(found[1:], samples, masks=False)
    bare = [replace(one, masks=()) for one in found]
    with pytest.raises(ValueError, match=f"{name}: detections without masks"):
        coco_metrics(bare, samples, masks=True)
    assert coco_metrics(bare, samples, masks=False)["box/AP"] > 0
    boxes_only: Any = Changed(samples, lambda o: replace(o, outlines=()))
    with pytest.raises(ValueError, match="no masks of objects"):
        coco_metrics(found, boxes_only, masks=True)
    alien = [replace(one, labels=one.labels + 3) for one in found]
    with pytest.raises(ValueError, match=f"{name}: a detection's label is not a class"):
        coco_metrics(alien, samples, masks=False)
    crowds: Any = Changed(samples, lambda o: replace(o, crowd=np.ones(len(o.labels), bool)))
    with pytest.raises(ValueError, match="not a crowd"):
        coco_metrics(found, crowds, masks=False)
    for module in ("pycocotools", "pycocotools.mask", "pycocotools.coco", "pycocotools.cocoeval"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[eval\]'"):
        coco_metrics(found, samples, masks=False)


def test_nothing_found_is_zero(tmp_path: Path) -> None:
    samples = coco.index_objects("val", _tree(tmp_path), errors=AnnotationErrors(0))
    none = ImageDetections(
        np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32)
    )
    values = coco_metrics([none] * len(samples), samples, masks=True)
    assert set(values.values()) == {0.0}


def test_run_lengths_that_would_hang_are_refused() -> None:
    mask = np.zeros((10, 12), np.uint8, order="F")
    mask[2:5, 3:7] = 1
    good = tools.encode(mask)
    coco.read_run_lengths(good, 10, 12)
    coco.read_run_lengths({"size": [10, 12], "counts": good["counts"].decode()}, 10, 12)
    with pytest.raises(ValueError, match="size"):
        coco.read_run_lengths(good, 12, 10)
    text = good["counts"].decode()
    for counts in ("", text[:-1], text + "1", "PPPPPP", "0", text[:-1] + chr(ord(text[-1]) + 32)):
        with pytest.raises(ValueError, match="add up"):
            coco.read_run_lengths({"size": [10, 12], "counts": counts}, 10, 12)
