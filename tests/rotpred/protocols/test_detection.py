"""Detection runs: resuming, results of the saved network, processes, external predictions."""

from __future__ import annotations

import contextlib
import json
import shutil
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as run_lengths

from pipelines.dense.loader import open_dense
from pipelines.dense.spec import ShortSide
from rotpred.distributed import Rank
from rotpred.metrics.predictions import read_detections
from rotpred.models.backbone import build_backbone
from rotpred.models.detection.masks import paste_masks
from rotpred.protocols import dense, detection
from rotpred.protocols.dense import scaled, validation
from rotpred.protocols.detection import DetectionTask
from rotpred.protocols.run import Run
from rotpred.protocols.scoring import Validation
from rotpred.recipes.detection import RECIPES, Detection, coco_det, voc0712_det
from rotpred.report.results import read_runs
from rotpred.training.schedule import Steps, lr_at
from rotpred.training.settings import Optim
from tests.support import processes
from tests.support.dense_trees import coco, voc
from tests.support.run_outputs import results, saved
from tests.support.toy_recipes import toy_detection

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny data sets: three images in each VOC list, three of COCO and one without objects."""
    base = tmp_path_factory.mktemp("trees")
    return {"voc0712_det": voc(base, n=3), "coco_det": coco(base, n=3)}


@pytest.fixture(scope="module", params=sorted(RECIPES))
def finished(
    request: pytest.FixtureRequest, roots: dict[str, Path], tmp_path_factory: Any
) -> Detection:
    """Each recipe, finished: three steps and a validation."""
    made = toy_detection(request.param, roots, tmp_path_factory.mktemp("finished"))
    detection.run(made, Rank())
    return made


def test_the_run_folder(finished: Detection) -> None:
    """Named losses that add up, a validation, figures, and results."""
    out, masks = Path(finished.run.out), finished.model == "mask_rcnn_fpn"
    for name in ("detections", "curves"):
        with Image.open(out / f"figures/{name}.png") as image:
            assert image.width > 300 and len(np.unique(np.asarray(image.convert("L")))) > 20
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        parts = {name: value for name, value in row.items() if name.startswith("loss/")}
        names = {"rpn_cls", "rpn_box", "cls", "box"} | ({"mask"} if masks else set())
        assert parts.keys() == {f"loss/{name}" for name in names}
        assert row["loss"] == pytest.approx(sum(parts.values()), rel=1e-5)
    found = results(out)
    first = ("box/AP", "box/AP50", "box/AP75", "mask/AP", "mask/AP50", "mask/AP75")
    for name in first if masks else ("AP", "AP50", "AP75", "AP/area", "AP50/area", "AP75/area"):
        assert 0 <= found[name]["value"] <= 100 and found[name]["n"] == 3
    assert next(iter(found)) == ("box/AP" if masks else "AP50")
    assert any("val/box/AP" in row or "val/AP50" in row for row in rows)
    assert (out / "done.json").exists() and found["training speed"]["value"] > 0


def test_predictions_are_those_of_the_saved_network(finished: Detection) -> None:
    """The result file equals the saved network applied to one image at a time."""
    out = Path(finished.run.out)
    masks = finished.model == "mask_rcnn_fpn"
    with open_dense(finished.val) as val, torch.no_grad():
        task, backbone = DetectionTask(finished), build_backbone("resnet18_tiny")
        model = task.network(backbone, len(val.classes)).eval()
        model.load_state_dict(saved(out))
        found = read_detections(out / "predictions.json", val.samples)
        count = 0
        for batch in val.epoch(0):
            i = int(batch.indices[0])
            (expected,) = model(batch.images, batch.sizes.tolist())
            scale = batch.originals[0] / batch.sizes[0]
            boxes = expected["boxes"] * scale.flip(0).repeat(2)
            count += len(boxes)
            torch.testing.assert_close(
                torch.from_numpy(found[i].boxes), boxes, rtol=1e-4, atol=1e-3
            )
            assert found[i].labels.tolist() == (expected["labels"] - 1).tolist()
            assert found[i].scores == pytest.approx(expected["scores"].numpy(), abs=1e-5)
            assert len(found[i].masks) == (len(boxes) if masks else 0)
            size = tuple(batch.originals[0].tolist())
            assert size == tuple(val.samples.sizes[i])
            if masks:
                planes = paste_masks(expected["masks"], boxes, size)
                for plane, lengths in zip(planes.numpy(), found[i].masks, strict=True):
                    other = run_lengths.encode(np.asfortranarray(plane, dtype=np.uint8))
                    same = run_lengths.iou([dict(lengths)], [other], [0])
                    assert not plane.any() or same.item() > 0.99
        assert count > 3


def test_an_interrupted_run_resumes(finished: Detection, tmp_path: Path) -> None:
    """Resumed from step 2 of 3: the same bits, samples and results as without interruption."""
    made = replace(finished, run=replace(finished.run, out=str(tmp_path)))
    detection.run(replace(made, run=replace(made.run, max_steps=2)), Rank())
    torch.rand(3)
    detection.run(made, Rank())
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("*2.*"))]
    whole, parts = saved(Path(finished.run.out)), saved(tmp_path)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    reports = [
        {name: row["value"] for name, row in results(out).items() if "AP" in name}
        for out in (Path(finished.run.out), tmp_path)
    ]
    assert reports[0] == reports[1]
    digests = [
        json.loads((out / "done.json").read_text())["stream_digest"]
        for out in (Path(finished.run.out), tmp_path)
    ]
    assert digests[0] == digests[1] != "0"


@pytest.mark.parametrize("last_step", [4, 5])
def test_of_many_validations_the_last_is_kept(
    monkeypatch: pytest.MonkeyPatch, last_step: int
) -> None:
    """Validations hold megabytes of figures; the one returned belongs to the final weights."""
    state: Any = types.SimpleNamespace(
        step=0, digest="", train_step=lambda *_: None, evaluation=contextlib.nullcontext
    )
    made: list[weakref.ref[Validation]] = []

    def steps(*_: object, evaluate: Callable[[int], float], **__: object) -> Iterator[None]:
        for state.step in range(1, last_step + 1):
            yield None
            if state.step % 2 == 0:
                assert evaluate(state.step) == state.step

    def validated() -> Validation:
        assert sum(ref() is not None for ref in made) <= 1
        found = validation({"AP": float(state.step)}, 1, {})
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr("rotpred.protocols.run.steps", steps)
    opened: Run[Any] = Run(voc0712_det(), Rank(rank=1, world=2), Path())
    opened.train = None
    opened.log = types.SimpleNamespace(validation=lambda **_: None)  # type: ignore[assignment]
    found = opened.fit(state, lambda _: pytest.fail(), validated)
    assert (
        found is not None
        and found.results == {"AP": last_step}
        and len(made) == (2 if last_step == 4 else 3)
    )
    assert [ref() is not None for ref in made] == [False] * (len(made) - 1) + [True]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_two_processes(name: str, roots: dict[str, Path], tmp_path: Path) -> None:
    """By the command: three steps of one image each, and every image validated once."""
    made = toy_detection(name, roots, tmp_path)
    args = [
        name, "--weights", "random", "--backbone", "resnet18_tiny", "--sync-bn", "off",
        "--proposals.anchors", *map(str, made.proposals.anchors), "--proposals.before", "40", "20",
        "--proposals.after", "20", "4", "--proposals.rois", "4", "--proposals.pooled", "6",
        "--train.root", str(roots[name]), "--train.batch-size", "1", "--train.workers", "1",
        "--train.geometry.lengths", "32", "--train.geometry.longest", "64",
        "--train.steps-per-epoch", "3", "--optim.reference-batch", "2", "--optim.lr", "0.01",
        "--val.root", str(roots[name]), "--val.geometry.lengths", "32", "--val.max-samples", "3",
        "--val.workers", "1", "--run.out", str(tmp_path / "run"), "--run.epochs", "1",
        "--run.device", "cpu", "--run.log-every-steps", "1", "--run.timeout", "90",
    ]  # fmt: skip
    console = tmp_path / "console.txt"
    assert processes.run(processes.evaluate, args, console=console, world=2) == [0, 0], (
        console.read_text()
    )
    found = results(tmp_path / "run")
    assert found["box/AP" if name == "coco_det" else "AP50"]["n"] == 3
    with open_dense(made.val) as val:
        # read_detections refuses images outside the data set; each came from one process.
        assert len(read_detections(tmp_path / "run/predictions.json", val.samples)) == 3
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


def test_the_rate_follows_the_number_of_images(
    roots: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """2 images per step instead of 16: an eighth of the rate, eight times the steps."""
    made = toy_detection("voc0712_det", roots, tmp_path)
    made = replace(
        made,
        train=replace(made.train, steps_per_epoch=1),
        optim=Optim(lr=0.02, reference_batch=16),
        run=replace(made.run, max_steps=1),
    )
    with caplog.at_level("INFO"):
        detection.run(made, Rank())
    assert "0.02 x 2/16 = 0.0025, and 1 steps an epoch x 16/2 = 8" in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["lr"] == pytest.approx(0.0025 * 0.001)
    with caplog.at_level("INFO"):  # two steps per update: the rate of four images
        scaled(replace(made, run=replace(made.run, accumulate=2)), Rank())
    assert "0.02 x 4/16 = 0.005, and 1 steps an epoch x 16/2 = 8" in caplog.text


def test_what_images_of_many_sizes_cannot_have(roots: dict[str, Path], tmp_path: Path) -> None:
    made = toy_detection("voc0712_det", roots, tmp_path)
    for name, words in (("compile", "no-compile"), ("cuda_graph", "no-cuda-graph")):
        with pytest.raises(ValueError, match=words):
            detection.run(replace(made, run=replace(made.run, **{name: True})), Rank())


def test_masks_are_loaded_for_who_learns_them(
    roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[bool] = []
    monkeypatch.setattr(dense, "run", lambda recipe, *_: opened.append(recipe.train.masks))
    masked = toy_detection("coco_det", roots, tmp_path)
    boxes: dict[str, Any] = {"model": "faster_rcnn_c4"}
    for made in (masked, replace(masked, **boxes), toy_detection("voc0712_det", roots, tmp_path)):
        detection.run(made, Rank())
    assert opened == [True, False, True]  # VOC has none
    with pytest.raises(ValueError, match=r"mask_rcnn_fpn learns masks: pass --train\.masks"):
        detection.run(replace(masked, train=replace(masked.train, masks=False)), Rank())


def test_predictions_of_others(roots: dict[str, Path], tmp_path: Path) -> None:
    """Text files of the devkit: the ground truth scores 100, a shifted box does not."""
    made = toy_detection("voc0712_det", roots, tmp_path / "run")
    lines: dict[str, list[str]] = {}
    with open_dense(replace(made.val, max_samples=None)) as val:
        for i, name in enumerate(val.samples.names):
            objects = val.samples.objects(i)
            for box, label in zip(objects.boxes.tolist(), objects.labels.tolist(), strict=True):
                corners = (box[0] + 1, box[1] + 1, box[2], box[3])
                lines.setdefault(val.classes[label], []).append(
                    " ".join([name, "0.9", *(f"{corner:.1f}" for corner in corners)])
                )
        classes = val.classes
    folder = tmp_path / "comp3"
    folder.mkdir()
    for name in classes:
        (folder / f"comp3_det_test_{name}.txt").write_text("\n".join(lines.get(name, [])))
    made = replace(made, predictions=str(folder), val=replace(made.val, max_samples=None))
    assert detection.run(made, Rank()) == tmp_path / "run"
    found = results(tmp_path / "run")
    assert found["AP50"]["value"] == found["AP75"]["value"] == pytest.approx(100)
    assert found["AP50"]["predictions"] == "comp3" and found["AP50"]["n"] == 3
    assert not list((tmp_path / "run/checkpoints").iterdir())
    assert (tmp_path / "run/figures/detections.png").exists()
    some = next(name for name, rows in lines.items() if rows)
    first = lines[some][0].split()
    first[2:] = [str(float(corner) + 200) for corner in first[2:]]
    (folder / f"comp3_det_test_{some}.txt").write_text(
        "\n".join([" ".join(first), *lines[some][1:]])
    )
    detection.run(made, Rank())
    assert results(tmp_path / "run")["AP50"]["value"] < 100
    made = replace(made, predictions=str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="nothing"):
        detection.run(made, Rank())


def test_the_predictions_of_a_run_score_as_the_run(finished: Detection, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    shutil.copy(Path(finished.run.out) / "predictions.json", path)
    run = replace(finished.run, out=str(tmp_path / "run"))
    detection.run(replace(finished, predictions=str(path), weights=None, run=run), Rank())
    before, after = results(Path(finished.run.out)), results(tmp_path / "run")
    (kept,) = read_runs(tmp_path / "run")  # as the report does
    assert {(r.kind, r.weights) for r in kept.results} == {("trained", "mine.json")}
    for name, row in before.items():
        if "AP" in name:
            assert after[name]["value"] == pytest.approx(row["value"], abs=0.05), name
    if finished.model == "mask_rcnn_fpn":  # without masks, only boxes are scored
        rows = json.loads(path.read_text())
        path.write_text(
            json.dumps([{k: row[k] for k in row if k != "segmentation"} for row in rows])
        )
        run = replace(finished.run, out=str(tmp_path / "boxes"))
        detection.run(replace(finished, predictions=str(path), run=run), Rank())
        assert {"box/AP"} <= results(tmp_path / "boxes").keys()
        assert not any(name.startswith("mask") for name in results(tmp_path / "boxes"))


def test_the_published_settings() -> None:
    """docs/protocols.md, Detection."""
    made = voc0712_det()
    assert made.train.steps_per_epoch == 2000 and made.run.epochs == 12
    assert (made.train.batch_size, made.optim.reference_batch, made.optim.lr) == (2, 16, 0.02)
    assert (made.optim.momentum, made.optim.weight_decay) == (0.9, 1e-4)
    assert made.optim.decay_rule == "no_norm" and made.train.keep_difficult
    rates = [lr_at(made.schedule, 0.02, k / 2000, 12) for k in (0, 50, 100, 17999, 18000, 22000)]
    assert rates == pytest.approx([2e-5, 0.01001, 0.02, 0.02, 0.002, 0.0002])
    assert made.train.geometry == ShortSide((480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800))
    assert made.val.geometry == ShortSide((800,), 1333) and made.train.flip and not made.val.flip
    assert (made.train.data, made.val.data) == ("voc:2007/trainval+2012/trainval", "voc:2007/test")
    assert (made.sync_bn, made.model) == ("torch", "faster_rcnn_c4")
    made = coco_det()
    assert made.train.steps_per_epoch == 7330 and made.run.epochs == 12
    rates = [lr_at(made.schedule, 0.02, k / 7330, 12) for k in (0, 250, 500, 58640, 80630)]
    assert rates == pytest.approx([2e-5, 0.01001, 0.02, 0.002, 0.0002])
    assert made.train.geometry == ShortSide((640, 672, 704, 736, 768, 800), 1333)
    assert (made.model, made.box_head, made.optim.decay_rule) == (
        "mask_rcnn_fpn",
        "4conv1fc",
        "all",
    )
    assert (made.train.data, made.val.data) == ("coco:train2017", "coco:val2017")
    assert not made.train.keep_empty and isinstance(made.schedule, Steps)
