"""The recipes on frozen features, from the layouts as they are handed out to exact numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from pipelines.datasets.voc_classification import VOC_CLASSES
from pipelines.loader import open_loader
from pipelines.spec import CenterCrop, LoaderSpec, Resize
from rotpred.distributed import Rank
from rotpred.protocols import knn, svm
from rotpred.recipes.base import CachedFeatureRun
from rotpred.recipes.knn import in1k_knn
from rotpred.recipes.svm import voc07_lowshot, voc07_svm
from rotpred.svm.low_shot import draw_samples
from rotpred.weights.frozen_backbone import load_frozen_backbone
from tests.conftest import save_jpeg, smooth_image
from tests.rotpred.protocols.test_svm import straight_ap, svc, unit
from tests.support.classification_trees import plant
from tests.support.run_outputs import results

pytestmark = pytest.mark.timeout(120)

COSTS = (0.5, 0.5**4, 0.5**9)
"""Low ones, which liblinear solves to the last digits in a moment."""
SPLITS = {"trainval": 48, "test": 21}

Rows = npt.NDArray[np.float32]
Unit = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int8]


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Labels]]:
    """VOCdevkit/VOC2007 with a few difficult labels, and those by split."""
    base = tmp_path_factory.mktemp("voc") / "VOCdevkit/VOC2007"
    (base / "ImageSets/Main").mkdir(parents=True)
    chance, tables = np.random.default_rng(0), {}
    for split, count in SPLITS.items():
        names = [f"{len(split)}{i:05}" for i in range(count)]
        for i, name in enumerate(names):
            image = smooth_image(i, 40 + i % 5, 44 + i % 7)
            save_jpeg(base / "JPEGImages" / f"{name}.jpg", image)
        draws = chance.random((count, len(VOC_CLASSES)))
        table = np.where(draws < 0.3, 1, np.where(draws < 0.4, 0, -1)).astype(np.int8)
        tables[split] = table
        for name, column in zip(VOC_CLASSES, table.T, strict=True):
            lines = [f"{n} {v:2}\n" for n, v in zip(names, column, strict=True)]
            (base / f"ImageSets/Main/{name}_{split}.txt").write_text("".join(lines))
    return base, tables


def averaged(spec: LoaderSpec, stage: str = "avgpool") -> tuple[Rows, list[int]]:
    """The average pool of images one by one, through random weights, and their labels.

    Or a stage's map, which is so small for images of 32 pixels that nothing is pooled.
    """
    torch.manual_seed(spec.seed)
    backbone = load_frozen_backbone("resnet18_tiny", "random", Rank())[0]
    rows, labels = [], []
    with open_loader(replace(spec, batch_size=1)) as loader, torch.no_grad():
        for batch in loader.epoch(0):
            maps = dict(zip(backbone.stage_names, backbone.stages(batch.images), strict=True))
            last = maps["res5"].mean((2, 3))
            rows.append((last if stage == "avgpool" else maps[stage]).numpy().ravel())
            labels.append(int(batch.labels))
    return np.stack(rows), labels


def full(rows: Unit, others: Unit, table: Labels, truths: Labels) -> list[float]:
    """The AP of every class by scikit-learn: 0 to 1; the cost by cross-validation."""
    expected = []
    for labels, truth in zip(table.T, truths.T, strict=True):
        signs = np.where(labels > 0, 1, -1)
        folds = list(StratifiedKFold(3).split(rows, signs))
        means = []
        for cost in COSTS:
            aps = []
            for fit, held in folds:
                scores = svc(cost).fit(rows[fit], signs[fit]).decision_function(rows[held])
                aps.append(average_precision_score(signs[held] > 0, scores))
            means.append(np.mean(aps))
        model = svc(COSTS[int(np.argmax(means))]).fit(rows, signs)
        keep = truth != 0
        expected.append(straight_ap(model.decision_function(others[keep]), truth[keep] > 0))
    return expected


def few(
    rows: Unit, others: Unit, table: Labels, truths: Labels, *, shots: int, draws: int
) -> npt.NDArray[np.float64]:
    """The mAP of every draw (with seed 0) by scikit-learn: 0 to 1; the cost on the test data."""
    classes = table.shape[1]
    signs = np.repeat([1, -1], [shots, shots * (classes - 1)])
    aps = np.zeros((draws, classes, len(COSTS)))
    for number, c, j in np.ndindex(aps.shape):
        chosen = draw_samples(table[:, c], shots, classes=classes, seed=(0, number, shots, c))
        model = svc(COSTS[j]).fit(rows[chosen], signs)
        keep = truths[:, c] != 0
        scores = model.decision_function(others[keep])
        aps[number, c, j] = straight_ap(scores, truths[keep, c] > 0)
    best: npt.NDArray[np.float64] = aps.mean(1)[:, aps.mean((0, 1)).argmax()]
    return best


def small(base: Path, out: Path) -> dict[str, Any]:
    """The changes that bring a VOC07 recipe to the tree, straight from its folder."""
    common: dict[str, Any] = {"root": str(base), "crop": Resize(32), "engine": "folder"}
    spec = replace(voc07_svm().train, batch_size=8, workers=1, **common)
    return {
        "weights": "random", "backbone": "resnet18_tiny", "costs": COSTS,
        "train": replace(spec, data="voc2007:trainval"), "train_labels": "voc2007:trainval",
        "val": replace(spec, data="voc2007:test"), "val_labels": "voc2007:test",
        "run": CachedFeatureRun(str(out / "run"), "cpu", cache=str(out / "cache")),
    }  # fmt: skip


def test_voc07_svm(voc: tuple[Path, dict[str, Labels]], tmp_path: Path) -> None:
    """Against scikit-learn, class after class: difficult is negative in training, not tested.

    All six stages of the recipe run; two are compared.
    """
    base, tables = voc
    recipe = replace(voc07_svm(), **small(base, tmp_path))
    out = svm.run(recipe, Rank())
    found = results(out)
    stages = ("stem", "res2", "res3", "res4", "res5", "avgpool")
    assert recipe.stages == stages
    assert set(found) == {f"{kind}/{stage}" for kind in ("mAP", "mAP11") for stage in stages}
    for stage in stages:
        row = found[f"mAP/{stage}"]
        assert (row["n"], row["classes"]) == (SPLITS["test"], list(VOC_CLASSES))
        assert row["value"] == pytest.approx(100 * np.mean(row["per_class"]), abs=1e-9)
        assert set(row["costs"]) <= set(COSTS)
    assert (out / "figures/per_class.png").exists()
    for stage in ("res4", "avgpool"):
        rows, others = (unit(averaged(part, stage)[0]) for part in (recipe.train, recipe.val))
        expected = full(rows, others, tables["trainval"], tables["test"])
        assert found[f"mAP/{stage}"]["per_class"] == pytest.approx(expected, abs=1e-6)


def test_voc07_lowshot(voc: tuple[Path, dict[str, Labels]], tmp_path: Path) -> None:
    """Against scikit-learn on the same draws; one cost for both, chosen on the test data.

    Both stages of the recipe run; the last is compared.
    """
    base, tables = voc
    changes = small(base, tmp_path) | {"shots": (1,), "draws": 2}
    recipe = replace(voc07_lowshot(), **changes)
    found = results(svm.run_low_shot(recipe, Rank()))
    rows, others = (unit(averaged(part, "res5")[0]) for part in (recipe.train, recipe.val))
    expected = few(rows, others, tables["trainval"], tables["test"], shots=1, draws=2)
    assert set(found) == {"mAP/res4/k=1", "mAP/res5/k=1"}
    row = found["mAP/res5/k=1"]
    assert (row["n"], row["draws"]) == (SPLITS["test"], 2)
    assert row["value"] == pytest.approx(100 * expected.mean(), abs=1e-6)
    assert row["deviation"] == pytest.approx(100 * expected.std(), abs=1e-6)


def test_in1k_knn(tmp_path: Path) -> None:
    """From class folders and the flat validation folder with its list of synsets."""
    tree = plant(tmp_path / "data")["in1k_linear"]
    made = in1k_knn()
    common: dict[str, Any] = {
        "crop": CenterCrop(32, 36), "engine": "folder", "workers": 1, "batch_size": 4
    }  # fmt: skip
    recipe = replace(
        made,
        weights="random",
        backbone="resnet18_tiny",
        neighbours=(1, 5),
        store="float32",
        train=replace(made.train, data=tree.train, root=tree.train_root, **common),
        val=replace(made.val, data=tree.val, root=tree.val_root, **common),
        run=CachedFeatureRun(str(tmp_path / "run"), "cpu", cache=str(tmp_path / "cache")),
    )
    found = results(knn.run(recipe, Rank()))
    (bank, labels), (queries, truth) = averaged(recipe.train), averaged(recipe.val)
    assert truth == tree.truth
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    for k in (1, 5):
        hits = 0
        for query, right in zip(queries, truth, strict=True):
            similar = bank @ query
            votes = np.zeros(4)
            for row in np.argsort(-similar)[:k]:
                votes[labels[row]] += np.exp(similar[row] / 0.07)
            hits += int(votes.argmax()) == right
        assert found[f"top1/k={k}"]["value"] == pytest.approx(10 * hits)
