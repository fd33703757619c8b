"""The COCO parser: boxes and masks against the pixels, run lengths, refused annotations."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.datasets import coco
from pipelines.datasets.annotations import AnnotationErrors
from pipelines.dense.loader import open_dense
from pipelines.dense.spec import DenseSpec
from tests.support import dense_trees
from tests.support.dense_trees import COCO_CATEGORIES, check_box, colored

pytestmark = pytest.mark.timeout(60)

N = 5


def test_coco_objects_lie_on_the_pixels(tmp_path: Path) -> None:
    root = dense_trees.coco(tmp_path, N)
    samples = coco.index_objects("train2017", root, errors=AnnotationErrors(0))
    assert samples.category_ids == (1, 3, 18) and samples.classes == ("person", "car", "dog")
    assert len(samples) == N + 1 and list(samples.names) == sorted(samples.names, key=int)
    kinds = [name for _, name in COCO_CATEGORIES]
    counts = []
    for i in range(len(samples)):
        objects = samples.objects(i)
        counts.append(len(objects.labels))
        assert len(objects.outlines) == counts[-1]
        height, width = map(int, samples.sizes[i])
        masks = coco.rasterize(objects.outlines, height, width)
        for k in np.flatnonzero(~objects.crowd):
            there = colored(samples.path(i), kinds.index(samples.classes[objects.labels[k]]))
            check_box(there, objects.boxes[k])
            assert there[masks[k] == 1].all()
            rows, columns = np.nonzero(masks[k])
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert objects.boxes[k].tolist() == box
        for k in np.flatnonzero(objects.crowd):
            assert masks[k, : height // 4, : width // 4].all()
            assert masks[k].sum() == (height // 4) * (width // 4)
    assert sorted(counts) == [0, *[2] * (N - 1), 3]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_run_lengths_and_polygons_are_pycocotools_own() -> None:
    tools = pytest.importorskip("pycocotools.mask")
    draw = np.random.default_rng(0)
    for _ in range(20):
        height, width = (int(v) for v in draw.integers(5, 300, 2))
        mask = (draw.random((height, width)) < draw.choice([0.01, 0.5, 0.999])).astype(np.uint8)
        mask[:, : width // 3] = 1
        packed = tools.encode(np.asfortranarray(mask))
        assert np.array_equal(coco.rasterize([packed], height, width)[0], mask)
        text = packed | {"counts": packed["counts"].decode()}
        plain = packed | {"counts": dense_trees.run_lengths(mask)}
        assert np.array_equal(coco.rasterize([text, plain], height, width), [mask, mask])
        polygons = (draw.random((2, 12)) * [*(width, height) * 6]).round(2).tolist()
        whole = tools.decode(tools.frPyObjects(polygons, height, width)).max(axis=2)
        assert np.array_equal(coco.rasterize([polygons], height, width)[0], whole)
    with pytest.raises(ValueError, match="run lengths of 7 pixels do not add up to 4x2"):
        coco.rasterize([{"size": [2, 4], "counts": [3, 4]}], 2, 4)


def test_without_pycocotools_nothing_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised at once as a user error, not minutes later by a thread of the loader."""
    root = dense_trees.coco(tmp_path, 3)
    (root / "annotations/instances_val2017.json").write_text(
        "{"
    )  # reading it would raise another error
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    for read in (
        lambda: coco.index_objects("val2017", root, errors=AnnotationErrors(0)),
        lambda: open_dense(DenseSpec(data="coco:val2017", root=str(root))),
        lambda: coco.import_pycocotools("mask"),
    ):
        with pytest.raises(ValueError, match=r"needs pycocotools: pip install -e '\.\[eval\]'"):
            read()


def test_wrong_coco_annotations_are_left_out_and_named(tmp_path: Path) -> None:
    root = dense_trees.coco(tmp_path, 3)
    source = root / "annotations/instances_val2017.json"
    content = json.loads(source.read_text())
    good = content["annotations"][0]
    content["annotations"] = [
        good,
        good | {"id": 1, "bbox": [0, 0, 500, 10]},
        good | {"id": 2, "bbox": [3, 3, 0, 10]},
        good | {"id": 3, "category_id": 2},
        good | {"id": 4, "image_id": 5},
        good | {"id": 5, "segmentation": [[1, 2, 3, 4]]},
        {"id": 6, "image_id": good["image_id"]},
        good | {"id": 7, "segmentation": {"size": [1, 2], "counts": [1, 1]}},
    ]
    missing = content["images"][1]
    (root / "val2017" / missing["file_name"]).unlink()
    source.write_text(json.dumps(content))
    errors = AnnotationErrors(8)
    samples = coco.index_objects("val2017", root, errors=errors)
    assert len(samples) == 3
    assert errors.found[0].startswith(f"{source}: image id {missing['id']}: no image ")
    for number, (line, what) in enumerate(
        zip(
            errors.found[1:],
            (
                "leaves the image", "has no area", "no category id 2", "no image id 5",
                "fewer than three points", "it has no 'category_id'", "run lengths of [1, 2]",
            ),
            strict=True,
        ),
        1,
    ):  # fmt: skip
        assert line.startswith(f"{source}: annotation id {number}: ") and what in line
    with pytest.raises(
        ValueError, match=r"8 wrong annotations, max_invalid_annotations is 7: .*; and 3 more"
    ):
        coco.index_objects("val2017", root, errors=AnnotationErrors(7))
    for text, what in (
        ("{", "not valid JSON"),
        ('{"images": []}', "expected images, annotations and"),
    ):
        source.write_text(text)
        with pytest.raises(ValueError, match=what):
            coco.index_objects("val2017", root, errors=AnnotationErrors(9))
