"""Recipes on frozen features: from published data set layouts to exact results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipelines.datasets.voc_classification import VOC_CLASSES
from pipelines.loader import open_loader
from pipelines.spec import CenterCrop, LoaderSpec, Resize
from rotpred.distributed import Rank
from rotpred.protocols import knn, svm
from rotpred.recipes.base import FeatureRun
from rotpred.recipes.knn import in1k_knn
from rotpred.recipes.svm import voc07_lowshot, voc07_svm
from rotpred.weights.frozen_backbone import load_frozen_backbone
from tests.support.classification_trees import make_trees
from tests.support.images import save_jpeg, smooth_image
from tests.support.references import LOW_COSTS, class_aps, low_shot_maps, unit_rows
from tests.support.run_outputs import results

pytestmark = pytest.mark.timeout(120)

SPLITS = {"trainval": 48, "test": 21}

Rows = npt.NDArray[np.float32]
Unit = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int8]


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Labels]]:
    """VOCdevkit/VOC2007 with a few difficult labels, and the labels by split."""
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
    """Average-pooled features of random weights, one image at a time, and the labels.

    For another stage, its flattened feature map: at 32 pixels it is too small to be pooled.
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


def small(base: Path, out: Path) -> dict[str, Any]:
    """Changes that run a VOC07 recipe on the tiny data set."""
    common: dict[str, Any] = {"root": str(base), "crop": Resize(32), "engine": "folder"}
    spec = replace(voc07_svm().train, batch_size=8, workers=1, **common)
    return {
        "weights": "random", "backbone": "resnet18_tiny", "costs": LOW_COSTS,
        "train": replace(spec, data="voc2007:trainval"), "train_labels": "voc2007:trainval",
        "val": replace(spec, data="voc2007:test"), "val_labels": "voc2007:test",
        "run": FeatureRun(str(out / "run"), "cpu"), "cache": str(out / "cache"),
    }  # fmt: skip


def test_voc07_svm(voc: tuple[Path, dict[str, Labels]], tmp_path: Path) -> None:
    """Against scikit-learn, class by class: difficult is negative in training and not tested.

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
        assert set(row["costs"]) <= set(LOW_COSTS)
    assert (out / "figures/per_class.png").exists()
    for stage in ("res4", "avgpool"):
        rows, others = (unit_rows(averaged(part, stage)[0]) for part in (recipe.train, recipe.val))
        expected = class_aps(rows, others, tables["trainval"], tables["test"])
        assert found[f"mAP/{stage}"]["per_class"] == pytest.approx(expected, abs=1e-6)


def test_voc07_lowshot(voc: tuple[Path, dict[str, Labels]], tmp_path: Path) -> None:
    """Against scikit-learn on the same draws, with one cost for both, chosen on the test data.

    Both stages of the recipe run; the last is compared.
    """
    base, tables = voc
    changes = small(base, tmp_path) | {"shots": (1,), "draws": 2}
    recipe = replace(voc07_lowshot(), **changes)
    found = results(svm.run_low_shot(recipe, Rank()))
    rows, others = (unit_rows(averaged(part, "res5")[0]) for part in (recipe.train, recipe.val))
    expected = low_shot_maps(rows, others, tables["trainval"], tables["test"], shots=1, draws=2)
    assert set(found) == {"mAP/res4/k=1", "mAP/res5/k=1"}
    row = found["mAP/res5/k=1"]
    assert (row["n"], row["draws"]) == (SPLITS["test"], 2)
    assert row["value"] == pytest.approx(100 * expected.mean(), abs=1e-6)
    assert row["deviation"] == pytest.approx(100 * expected.std(), abs=1e-6)


def test_in1k_knn(tmp_path: Path) -> None:
    """From class folders and the flat validation folder with its list of synsets."""
    tree = make_trees(tmp_path / "data")["in1k_linear"]
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
        run=FeatureRun(str(tmp_path / "run"), "cpu"),
        cache=str(tmp_path / "cache"),
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
