"""Predictions: gathering over processes, result files, VOC text files, masks, errors."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.datasets import cityscapes, coco, voc
from pipelines.datasets.annotations import AnnotationErrors, DenseSamples, ObjectSamples
from rotpred import distributed
from rotpred.distributed import Rank
from rotpred.metrics.coco_detection import coco_metrics
from rotpred.metrics.detections import ImageDetections
from rotpred.metrics.predictions import (
    gather_detections,
    read_detections,
    read_masks,
    write_detections,
)
from rotpred.metrics.voc_detection import voc_metrics
from tests.support import dense_trees, processes

pytestmark = pytest.mark.timeout(120)


def random_detections(seed: int, k: int, *, masks: bool) -> ImageDetections:
    draw = np.random.default_rng(seed)
    corner = draw.uniform(0, 50, (k, 2))
    boxes = np.hstack([corner, corner + draw.uniform(1, 40, (k, 2))]).astype(np.float32)
    runs = [{"size": [96, 128], "counts": f"run lengths {seed} {j}"} for j in range(k)]
    scores = draw.random(k).astype(np.float32)
    return ImageDetections(boxes, draw.integers(0, 3, k), scores, tuple(runs) if masks else ())


def same(a: Sequence[ImageDetections], b: Sequence[ImageDetections]) -> bool:
    return len(a) == len(b) and all(
        x.masks == y.masks
        and x.boxes.dtype == y.boxes.dtype
        and all(np.array_equal(getattr(x, n), getattr(y, n)) for n in ("boxes", "labels", "scores"))
        for x, y in zip(a, b, strict=True)
    )


def cases(n: int) -> list[ImageDetections]:
    return [random_detections(i, (5 * i) % 4, masks=i % 2 == 0) for i in range(n)]


def gather(folder: Path) -> int:
    """One of several processes: images are distributed unevenly."""
    with distributed.process_group("cpu", timeout_seconds=60) as rank:
        everything = cases(7)
        mine = {0: (6, 2, 5, 0, 4), 1: (3, 1)}[rank.rank]
        got = gather_detections({i: everything[i] for i in mine}, 7, rank)
        none = gather_detections({0: everything[3]} if rank.main else {}, 1, rank)
        empty = gather_detections({rank.rank: random_detections(0, 0, masks=False)}, 2, rank)
        said = {
            "same": same(got, everything),
            "none": same(none, everything[3:4]),
            "empty": [len(one.boxes) for one in empty],
        }
        wrong = {"twice": {0: everything[0]}, "alien": {rank.rank: everything[1]}}
        for name, shared in wrong.items():
            try:
                gather_detections(shared, 1, rank)
            except ValueError as error:
                said[name] = str(error)
    (folder / f"{rank.rank}.json").write_text(json.dumps(said))
    return 0


def test_two_processes_gather_the_same(tmp_path: Path) -> None:
    console = tmp_path / "console"
    assert processes.run(gather, tmp_path, console=console, world=2) == [0, 0], console.read_text()
    for rank in (0, 1):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert said["same"] is True and said["none"] is True and said["empty"] == [0, 0]
        assert "duplicate" in said["twice"] and said["twice"].endswith("[0]")
        assert said["alien"].endswith("[1]")


def test_one_process_gathers_its_own() -> None:
    everything = cases(7)
    shuffled = {i: everything[i] for i in (3, 1, 6, 0, 2, 5, 4)}
    assert same(gather_detections(shuffled, 7, Rank()), everything)
    with pytest.raises(ValueError, match=r"1 images are missing.*\[2\]"):
        gather_detections({i: everything[i] for i in (0, 1)}, 3, Rank())


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> coco.CocoSamples:
    root = dense_trees.coco(tmp_path_factory.mktemp("trees"))
    return coco.index_objects("val2017", root, errors=AnnotationErrors(0))


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> ObjectSamples:
    root = dense_trees.voc(tmp_path_factory.mktemp("trees"))
    return voc.index_boxes("2007/test", root, errors=AnnotationErrors(0))


def perfect(samples: DenseSamples, *, masks: bool) -> list[ImageDetections]:
    """The true objects with falling scores, and a second detection of half the width."""
    tools: Any = pytest.importorskip("pycocotools.mask") if masks else None
    found = []
    for i in range(len(samples)):
        truth = samples.objects(i)
        keep = ~truth.crowd
        half = truth.boxes[keep].copy()
        half[:, 2] = (half[:, 0] + half[:, 2]) / 2
        runs = ()
        if masks:
            height, width = samples.sizes[i].tolist()
            outlines = [o for o, k in zip(truth.outlines, keep, strict=True) if k]
            pixels = coco.rasterize(outlines, height, width)
            runs = tuple(tools.encode(np.asfortranarray(one)) for one in pixels) * 2
        scores = np.linspace(0.9, 0.1, 2 * len(half), dtype=np.float32)
        labels = np.tile(truth.labels[keep], 2)
        found.append(ImageDetections(np.vstack([truth.boxes[keep], half]), labels, scores, runs))
    return found


def test_results_of_coco_come_back(objects: coco.CocoSamples, tmp_path: Path) -> None:
    found, path = perfect(objects, masks=True), tmp_path / "found.json"
    write_detections(path, found, objects)
    rows = json.loads(path.read_text())
    assert {row["category_id"] for row in rows} <= {i for i, _ in dense_trees.COCO_CATEGORIES}
    assert {row["image_id"] for row in rows} <= {int(name) for name in objects.names}
    where = objects.names.index(str((first := rows[0])["image_id"]))
    left, top, right, bottom = found[where].boxes[0].tolist()
    assert first["bbox"] == [left, top, right - left, bottom - top]
    kinds = dict(dense_trees.COCO_CATEGORIES)
    assert kinds[first["category_id"]] == objects.classes[found[where].labels[0]]
    back = read_detections(path, objects)
    assert same(back, found)
    values = coco_metrics(back, objects, masks=True)
    assert values == coco_metrics(found, objects, masks=True)
    assert values["mask/AP"] > 0.5
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]


def test_results_of_voc_come_back(boxes: ObjectSamples, tmp_path: Path) -> None:
    found, path = perfect(boxes, masks=False), tmp_path / "found.json"
    write_detections(path, found, boxes)
    rows = json.loads(path.read_text())
    # Leading zeros belong to a VOC name; class numbers count from 1.
    assert {row["image_id"] for row in rows} == set(boxes.names)
    assert rows[0]["category_id"] == found[0].labels[0] + 1
    assert same(read_detections(path, boxes), found)


@pytest.mark.parametrize("before", [None, "[]"])
def test_a_full_disk_leaves_nothing_half(
    boxes: ObjectSamples, tmp_path: Path, before: str | None
) -> None:
    """No temporary or partial file; the previous file stays."""
    found, path = perfect(boxes, masks=False), tmp_path / "found.json"
    if before is not None:
        path.write_text(before)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # writes fail in the middle
    try:
        with pytest.raises(OSError, match="File too large"):
            write_detections(path, found, boxes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.read_text() for file in tmp_path.iterdir()] == ([before] if before else [])


def devkit(
    folder: Path, found: Sequence[ImageDetections], samples: DenseSamples, prefix: str
) -> Path:
    """VOC's text files of detections."""
    folder.mkdir()
    for label, name in enumerate(samples.classes):
        lines = [
            f"{samples.names[i]} {score} {left + 1} {top + 1} {right} {bottom}"
            for i, one in enumerate(found)
            for (left, top, right, bottom), kind, score in zip(
                one.boxes.tolist(), one.labels, one.scores.tolist(), strict=True
            )
            if kind == label
        ]
        (folder / f"{prefix}{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.mark.parametrize("prefix", ["comp3_det_test_", ""])
def test_text_files_of_voc_score_the_same(
    boxes: ObjectSamples, tmp_path: Path, prefix: str
) -> None:
    found = perfect(boxes, masks=False)
    back = read_detections(devkit(tmp_path / "dets", found, boxes, prefix), boxes)
    assert voc_metrics(back, boxes) == voc_metrics(found, boxes)
    assert [len(one.boxes) for one in back] == [len(one.boxes) for one in found]


def test_mistakes_in_text_files_are_named(boxes: ObjectSamples, tmp_path: Path) -> None:
    folder = devkit(tmp_path / "dets", perfect(boxes, masks=False), boxes, "comp4_det_test_")
    dog = folder / "comp4_det_test_dog.txt"
    good, name = dog.read_text(), boxes.names[0]
    count = len(good.splitlines())
    for line, words in {
        f"{name} 0.5 1 2 3": "expected NAME SCORE",
        f"{name} 0.5 1 2 3 x": "could not convert",
        f"{name} 0.5 1 2 nan 4": "nan is not finite",
        f"{name} 0.5 1 2 1e60 4": "1e+60 is not finite",
        "999999 0.5 1 2 3 4": "no image is called '999999'",
    }.items():
        dog.write_text(good + line + "\n")
        where = re.escape(f"{dog}:{count + 1}: ")
        with pytest.raises(ValueError, match=f"{where}.*{re.escape(words)}"):
            read_detections(folder, boxes)
    dog.unlink()
    with pytest.raises(ValueError, match=r"no file \*_dog.txt"):
        read_detections(folder, boxes)
    dog.write_text(good)
    (folder / "comp3_det_test_dog.txt").write_text("")
    with pytest.raises(ValueError, match="both of class dog"):
        read_detections(folder, boxes)
    (folder / "comp3_det_test_dog.txt").unlink()
    (folder / "comp4_det_test_unicorn.txt").write_text("")
    with pytest.raises(ValueError, match=r"unicorn\.txt: its name does not end in a class"):
        read_detections(folder, boxes)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_detections(tmp_path / "absent", boxes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 1}, "no image has image_id 1"),
        ({"category_id": 2}, "no class has category_id 2"),
        ({"category_id": [1]}, "TypeError"),
        ({"bbox": [0, 0, 1]}, "not enough values"),
        ({"bbox": [0, 0, float("inf"), 1]}, "inf is not finite"),
        ({"score": float("nan")}, "nan is not finite"),
        ({"score": None}, "TypeError"),
        ({"segmentation": [[0, 0, 1, 1, 1, 0]]}, "compressed run lengths"),
        ({"segmentation": {"size": [1, 1], "counts": "01"}}, "size"),
    ],
)
def test_mistakes_in_results_are_named(
    objects: coco.CocoSamples, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    path = tmp_path / "found.json"
    write_detections(path, perfect(objects, masks=False), objects)
    rows = json.loads(path.read_text())
    rows[3] |= change
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=re.escape(f"{path}: entry 3: ") + f".*{words}"):
        read_detections(path, objects)


def test_results_that_are_none_are_refused(objects: coco.CocoSamples, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    for text, words in {
        "{": "is not JSON",
        "{}": "expected a list",
        "[1]": "entry 0: TypeError",
        '[{"bbox": []}]': "entry 0: it has no 'image_id'",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_detections(path, objects)
    write_detections(path, perfect(objects, masks=True), objects)
    rows = json.loads(path.read_text())
    del rows[0]["segmentation"]
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="not all detections have masks"):
        read_detections(path, objects)


def save(path: Path, pixels: np.ndarray[Any, np.dtype[np.uint8]], *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def test_masks_of_cityscapes(tmp_path: Path) -> None:
    root = dense_trees.cityscapes(tmp_path / "tree", n=3)
    samples = cityscapes.index_masks("val", root, errors=AnnotationErrors(0))
    # The ground truth files, in the folders of their cities, hold label ids of the right classes.
    truth = root / "gtFine" / "val"
    for i in range(len(samples)):
        expected = samples.mask(i)
        np.testing.assert_array_equal(read_masks(truth, samples, i, label_ids=True), expected)
        assert (expected == 255).any() and len(np.unique(expected)) > 3
        save(tmp_path / "flat" / f"{samples.names[i]}.png", expected, palette=i == 0)
        np.testing.assert_array_equal(read_masks(tmp_path / "flat", samples, i), expected)
    with pytest.raises(ValueError, match="number 23, which is none of the 19 classes"):
        read_masks(truth, samples, 0)


def test_mistakes_in_masks_are_named(tmp_path: Path) -> None:
    root = dense_trees.cityscapes(tmp_path / "tree", n=1)
    samples = cityscapes.index_masks("val", root, errors=AnnotationErrors(0))
    name, folder = samples.names[0], tmp_path / "masks"
    height, width = samples.sizes[0].tolist()
    blank = np.zeros((height, width), np.uint8)
    with pytest.raises(FileNotFoundError, match=f"no {name}.png"):
        read_masks(folder, samples, 0)
    file = folder / f"{name}.png"
    save(file, blank[:, 1:])
    with pytest.raises(
        ValueError,
        match=rf"{name}.png: {width - 1}x{height} pixels, the image has {width}x{height}",
    ):
        read_masks(folder, samples, 0)
    save(file, np.zeros((height, width, 3), np.uint8))
    with pytest.raises(ValueError, match=f"{name}.png: .*mode RGB"):
        read_masks(folder, samples, 0)
    file.write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"{name}.png: "):
        read_masks(folder, samples, 0)
    file.unlink()
    for ending in ("a", "b"):
        save(folder / f"{name}_{ending}.png", blank)
    with pytest.raises(ValueError, match="keep one"):
        read_masks(folder, samples, 0)
