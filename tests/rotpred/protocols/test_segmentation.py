"""Segmentation runs: exact mean IoU, resuming, processes, external predictions."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix

from pipelines.datasets.annotations import IGNORED
from pipelines.dense.loader import open_dense
from pipelines.dense.spec import FitWithin
from rotpred.distributed import Rank
from rotpred.models.backbone import build_backbone
from rotpred.models.fcn import Fcn
from rotpred.protocols import segmentation
from rotpred.recipes.segmentation import RECIPES, Segmentation
from rotpred.training.settings import Optim
from tests.support import processes
from tests.support.dense_trees import cityscapes, voc_masks
from tests.support.references import naive_slide
from tests.support.run_outputs import results, saved
from tests.support.toy_recipes import toy_segmentation

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny data sets: eight images of 48 x 64 in each VOC list, five of 40 x 80 of Cityscapes."""
    base = tmp_path_factory.mktemp("trees")
    return {
        "voc12aug_seg": voc_masks(base, n=8, side=48),
        "cityscapes_seg": cityscapes(base, n=5, height=40, width=80),
    }


def numbers(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)


@pytest.fixture(scope="module", params=sorted(RECIPES))
def finished(
    request: pytest.FixtureRequest, roots: dict[str, Path], tmp_path_factory: Any
) -> Segmentation:
    """Each recipe, finished."""
    made = toy_segmentation(request.param, roots, tmp_path_factory.mktemp("finished"))
    segmentation.run(made, Rank())
    return made


def test_results_are_those_of_the_saved_masks(finished: Segmentation) -> None:
    """mIoU, recall and accuracy, from scikit-learn's confusion matrix of the saved masks."""
    out = Path(finished.run.out)
    found, predicted, truths = results(out), [], []
    with open_dense(finished.val) as val:
        for i, name in enumerate(val.samples.names):
            truth, mask = val.samples.mask(i), numbers(out / f"predictions/{name}.png")
            assert mask.shape == truth.shape
            truths.append(truth[truth != IGNORED])
            predicted.append(mask[truth != IGNORED])
        classes = val.classes
    matrix = confusion_matrix(
        np.concatenate(truths), np.concatenate(predicted), labels=range(len(classes))
    )
    right = np.diag(matrix)
    unions = matrix.sum(0) + matrix.sum(1) - right
    ious = {f"IoU/{classes[k]}": 100 * right[k] / unions[k] for k in np.flatnonzero(unions)}
    actual = matrix.sum(1) > 0
    assert {k: row["value"] for k, row in found.items() if k.startswith("IoU/")} == pytest.approx(
        ious
    )
    assert found["mIoU"]["value"] == pytest.approx(np.mean(list(ious.values())))
    assert found["accuracy"]["value"] == pytest.approx(100 * right.sum() / matrix.sum())
    recall = 100 * np.mean(right[actual] / matrix.sum(1)[actual])
    assert found["mean recall"]["value"] == pytest.approx(recall)
    assert found["mIoU"]["n"] == len(predicted) == 5 and found["mIoU"]["unit"] == "%"
    assert len(classes) == (21 if finished.test == "whole" else 19)


def test_masks_are_those_of_the_saved_network(finished: Segmentation) -> None:
    """One image at a time, with logits resized twice: to the input and to the stored size."""
    out, align = Path(finished.run.out), finished.align_corners
    with open_dense(replace(finished.val, batch_size=1)) as val, torch.no_grad():
        model = Fcn(build_backbone("resnet18_tiny"), len(val.classes)).eval()
        model.load_state_dict(saved(out))
        for batch in val.epoch(0):
            i = int(batch.indices[0])

            def logits_of(x: torch.Tensor) -> torch.Tensor:
                logits: torch.Tensor = F.interpolate(
                    model(x), x.shape[2:], mode="bilinear", align_corners=align
                )
                return logits

            if finished.test == "slide":
                logits = naive_slide(logits_of, batch.images, 33, 20)
            else:
                logits = logits_of(batch.images)
            size = tuple(val.samples.sizes[i].tolist())
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=align)
            expected = logits.argmax(1)[0].numpy()
            mask = numbers(out / f"predictions/{val.samples.names[i]}.png")
            # Summing windows in another order may break a tie.
            assert (mask != expected).mean() < 0.002


def test_the_run_folder(finished: Segmentation) -> None:
    """Figures of curves and masks, losses and accuracy in the log, a validation each epoch."""
    out = Path(finished.run.out)
    for name in ("masks", "curves"):
        with Image.open(out / f"figures/{name}.png") as image:
            assert image.width > 300 and len(np.unique(np.asarray(image.convert("L")))) > 20
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in rows if "val/mIoU" in row] == [2, 4]
    assert len(steps) == 4
    for row in steps:
        parts = row["loss/decode"] + 0.4 * row["loss/auxiliary"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5) and 0 <= row["accuracy"] <= 100
    assert (out / "done.json").exists() and results(out)["training speed"]["value"] > 0


def test_a_run_resumes_bit_for_bit(finished: Segmentation, tmp_path: Path) -> None:
    """Interrupted inside the second epoch, then resumed; dropout draws the same numbers."""
    run = replace(finished.run, out=str(tmp_path))
    segmentation.run(replace(finished, run=replace(run, max_steps=3)), Rank())
    torch.manual_seed(99)
    segmentation.run(replace(finished, run=run), Rank())
    expected = saved(Path(finished.run.out))
    for name, tensor in saved(tmp_path).items():
        assert torch.equal(tensor, expected[name]), name
    mean_iou = results(tmp_path)["mIoU"]["value"]
    assert mean_iou == results(Path(finished.run.out))["mIoU"]["value"]


def test_the_folder_of_masks_scores_the_same(finished: Segmentation, tmp_path: Path) -> None:
    out = Path(finished.run.out)
    folder = str(out / "predictions")
    made = replace(finished, predictions=folder, run=replace(finished.run, out=str(tmp_path)))
    assert segmentation.run(made, Rank()) == tmp_path
    found, expected = results(tmp_path), results(out)
    values = {name: row["value"] for name, row in found.items()}
    assert values == {name: expected[name]["value"] for name in values}
    assert "mIoU" in values and (tmp_path / "figures/masks.png").exists()
    few = tmp_path / "few"
    shutil.copytree(folder, few)
    path = min(few.glob("*.png"))
    mask = numbers(path)
    for pixels, words in (
        (mask[1:], "pixels, the image has"),
        (np.full_like(mask, 250), "250"),
        (mask | 255, "255"),
    ):
        Image.fromarray(pixels).save(path)
        with pytest.raises(ValueError, match=words):
            segmentation.run(replace(made, predictions=str(few)), Rank())
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.stem):
        segmentation.run(replace(made, predictions=str(few)), Rank())


def test_label_ids_are_read_where_told(roots: dict[str, Path], tmp_path: Path) -> None:
    """The ground truth in the format of the Cityscapes server: 100 %."""
    root = roots["cityscapes_seg"] / "gtFine/val"
    for path in root.glob("*/*_labelIds.png"):
        city = tmp_path / "theirs" / path.parent.name
        city.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, city)
    made = toy_segmentation(
        "cityscapes_seg", roots, tmp_path / "out", predictions=str(tmp_path / "theirs")
    )
    found = results(segmentation.run(replace(made, label_ids=True), Rank()))
    assert found["mIoU"]["value"] == found["accuracy"]["value"] == 100
    assert {name for name in found if name.startswith("IoU/")} == {"IoU/road", "IoU/sky", "IoU/car"}
    with pytest.raises(ValueError, match="number 23, which is none of the 19 classes"):
        segmentation.run(made, Rank())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_two_processes(name: str, roots: dict[str, Path], tmp_path: Path) -> None:
    """By the command; its weights, validated by one process, give equal masks and metrics."""
    root, out, alone = roots[name], tmp_path / "run", tmp_path / "alone"
    common = [
        name, "--weights", "random", "--backbone", "resnet18_tiny", "--sync-bn", "off",
        "--train.root", str(root), "--train.steps-per-epoch", "2", "--train.workers", "1",
        "--val.root", str(root), "--val.workers", "1", "--val.max-samples", "5",
        "--optim.reference-batch", "None",
        "--train.geometry.size", "40", "--train.geometry.long", "64",
        "--train.geometry.short", "40", "--val.geometry.long", "64",
        "--val.geometry.short", "40", "--slide-crop", "33", "--slide-stride", "20",
        "--save-predictions", "--run.epochs", "1", "--run.device", "cpu",
    ]  # fmt: skip
    arguments = [*common, "--train.batch-size", "1", "--run.out", str(out)]
    console = tmp_path / "console"
    status = processes.run(processes.evaluate, arguments, console=console, world=2)
    assert status == [0, 0], console.read_text()[-3000:]
    shutil.copytree(out / "checkpoints", alone / "checkpoints")
    arguments = [*common, "--train.batch-size", "2", "--run.out", str(alone)]
    status = processes.run(processes.evaluate, arguments, console=console)
    assert status == [0], console.read_text()[-3000:]
    found, expected = results(alone), results(out)
    for metric in ("mIoU", "accuracy", "mean recall"):
        assert found[metric]["value"] == expected[metric]["value"]
        assert found[metric]["n"] == expected[metric]["n"] == 5
    masks = sorted(path.name for path in (out / "predictions").rglob("*.png"))
    assert len(masks) == 5
    for path in (out / "predictions").rglob("*.png"):
        other = alone / path.relative_to(out)
        assert np.array_equal(numbers(path), numbers(other))


@pytest.mark.overfit
@pytest.mark.timeout(600)
def test_eight_images_are_overfitted(roots: dict[str, Path], tmp_path: Path) -> None:
    """From random weights, with recipe overrides only; the remaining errors lie along edges."""
    made = toy_segmentation("voc12aug_seg", roots, tmp_path)
    data: dict[str, Any] = {"data": "vocseg:2012/train", "max_samples": 8}
    data["geometry"] = FitWithin(64, 48)
    made = replace(
        made,
        train=replace(
            made.train, **data, batch_size=4, steps_per_epoch=80, flip=False, photometric=False
        ),
        val=replace(made.val, **data),
        optim=Optim(lr=0.03, weight_decay=0.0),
        run=replace(made.run, epochs=1, log_every_steps=20),
    )
    found = results(segmentation.run(made, Rank()))
    assert found["mIoU"]["value"] > 92 and found["accuracy"]["value"] > 97
