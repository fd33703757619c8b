"""SVM runs of the VOC07 protocols: run folders, labels, class names, figures."""

from __future__ import annotations

import json
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from pipelines.datasets.voc_classification import VOC_CLASSES
from pipelines.spec import CenterCrop, LoaderSpec
from rotpred.distributed import Rank
from rotpred.plots import svm as svm_plots
from rotpred.protocols import svm
from rotpred.recipes.base import FeatureRun
from rotpred.recipes.svm import LowShot, Svm, voc07_lowshot, voc07_svm
from rotpred.records.tensorboard import pixels
from tests.support.references import EXACT_COSTS

pytestmark = pytest.mark.timeout(120)


T = TypeVar("T", Svm, LowShot)


def spec(samples: int, seed: int) -> LoaderSpec:
    return LoaderSpec(
        data="synthetic", samples=samples, seed=seed, batch_size=16, views="plain",
        crop=CenterCrop(32, None), flip=False, shuffle=False, drop_last=False,
    )  # fmt: skip


def test_run_folders(tmp_path: Path) -> None:
    """From images to rows and figures; a finished folder is left unchanged."""
    place = FeatureRun(str(tmp_path / "full"), "cpu")
    table = np.where(np.arange(24)[:, None] % 3 == np.arange(3), 1, -1).astype(np.int8)
    np.save(tmp_path / "labels.npy", table)
    common = {
        "weights": "random", "backbone": "resnet18_tiny", "train": spec(24, 0),
        "val": spec(24, 1), "train_labels": str(tmp_path / "labels.npy"),
        "val_labels": str(tmp_path / "labels.npy"), "stages": ("res5", "avgpool"),
        "costs": EXACT_COSTS, "cache": str(tmp_path / "cache"),
    }  # fmt: skip
    common["costs"] = (*EXACT_COSTS, 0.1)  # 0.1 is another number in float32
    full = Svm(run=place, class_names=("ox", "ass", "goose"), **common)  # type: ignore[arg-type]
    out = svm.run(full, Rank())
    rows = {row["metric"]: row for row in json.loads((out / "results.json").read_text())}
    assert set(rows) == {f"{m}/{s}" for m in ("mAP", "mAP11") for s in ("res5", "avgpool")}
    row = rows["mAP/res5"]
    assert row["value"] == pytest.approx(100 * np.mean(row["per_class"])) and row["n"] == 24
    assert row["classes"] == ["ox", "ass", "goose"] and len(row["per_class"]) == 3
    assert set(row["costs"]) <= set(common["costs"])
    assert (out / "figures" / "per_class.png").exists() and (out / "done.json").exists()
    written = (out / "results.json").stat().st_mtime_ns
    svm.run(full, Rank())
    assert (out / "results.json").stat().st_mtime_ns == written

    few = LowShot(
        shots=(1, 4),
        draws=2,
        run=FeatureRun(str(tmp_path / "few"), "cpu"),
        **common,
    )  # type: ignore[arg-type]
    out = svm.run_low_shot(few, Rank())
    rows = {row["metric"]: row for row in json.loads((out / "results.json").read_text())}
    assert set(rows) == {f"mAP/{s}/k={k}" for s in ("res5", "avgpool") for k in (1, 4)}
    row = rows["mAP/avgpool/k=4"]
    assert row["lowest"] <= row["value"] <= row["highest"] and row["cost"] in EXACT_COSTS
    assert (out / "figures" / "low_shot.png").exists()


def tables(made: T, folder: Path, **changes: Any) -> T:
    """A recipe whose labels of 24 samples are in labels.npy of the folder."""
    return replace(
        made, weights="random", backbone="resnet18_tiny", train=spec(24, 0), val=spec(24, 1),
        train_labels=str(folder / "labels.npy"), val_labels=str(folder / "labels.npy"),
        stages=("avgpool",),
        run=FeatureRun(str(folder / "run"), "cpu"), cache=str(folder / "cache"),
        **changes,
    )  # fmt: skip


def test_labels_of_another_data_set_are_refused(tmp_path: Path) -> None:
    """Fewer rows and more rows: VOC07's trainval has more images than its test split."""
    for rows in (5, 27):
        np.save(tmp_path / "labels.npy", np.ones((rows, 3), np.int8))
        recipe = tables(Svm(), tmp_path)
        with pytest.raises(ValueError, match=f"has {rows} rows, but the data have 24 samples"):
            svm.run(recipe, Rank())
    assert not (tmp_path / "cache").exists()  # before any image is read


@pytest.mark.parametrize(
    ("made", "change", "words"),
    [
        (Svm(), (slice(0, 22), 1, -1), "class ass has 1 positive samples in the training data"),
        (Svm(), (slice(0, 24), 2, 0), "class goose has 0 positive samples in the training data"),
        (LowShot(), (slice(0, 24), 0, 1), "class ox has 0 negative samples in the training data"),
    ],
)
def test_a_class_with_too_few_samples_is_named(
    made: Svm | LowShot, change: tuple[slice, int, int], words: str, tmp_path: Path
) -> None:
    table = np.where(np.arange(24)[:, None] % 3 == np.arange(3), 1, -1).astype(np.int8)
    rows, column, value = change
    table[rows, column] = value
    np.save(tmp_path / "labels.npy", table)
    made = tables(made, tmp_path, class_names=("ox", "ass", "goose"))
    if isinstance(made, LowShot):
        made = replace(made, shots=(2, 1))
    with pytest.raises(ValueError, match=words):
        svm.run(made, Rank()) if isinstance(made, Svm) else svm.run_low_shot(made, Rank())


def test_test_data_without_a_class_are_refused(tmp_path: Path) -> None:
    table = np.where(np.arange(24)[:, None] % 3 == np.arange(3), 1, -1).astype(np.int8)
    np.save(tmp_path / "labels.npy", table)
    table[:, 2] = -1
    np.save(tmp_path / "test.npy", table)
    made = replace(tables(Svm(), tmp_path), val_labels=str(tmp_path / "test.npy"))
    with pytest.raises(ValueError, match="class 2 has 0 positive samples in the test data"):
        svm.run(made, Rank())


@pytest.mark.parametrize("kind", [Svm, LowShot])
def test_names_must_be_as_many_as_the_classes(
    kind: type[Svm] | type[LowShot], tmp_path: Path
) -> None:
    np.save(tmp_path / "labels.npy", np.ones((24, 3), np.int8))
    common = {"train_labels": str(tmp_path / "labels.npy"), "stages": ("avgpool",)}
    recipe = kind(
        weights="random", backbone="resnet18_tiny", train=spec(24, 0), val=spec(24, 1),
        val_labels=common["train_labels"], class_names=VOC_CLASSES, **common,
        run=FeatureRun(str(tmp_path / "run"), "cpu"), cache=str(tmp_path / "cache"),
    )  # type: ignore[arg-type]  # fmt: skip
    execute = svm.run if kind is Svm else svm.run_low_shot
    words = "20 class_names for labels of 3 classes: pass --class-names"
    with pytest.raises(ValueError, match=words):
        execute(recipe, Rank())  # type: ignore[operator]


def test_names_of_the_columns() -> None:
    """Names of the recipe first, then of the data if their number fits, then numbers."""

    def names(given: tuple[str, ...], train: tuple[str, ...], val: tuple[str, ...]) -> str:
        parts: Any = tuple(types.SimpleNamespace(classes=part) for part in (train, val))
        return " ".join(svm._class_names(Svm(class_names=given), parts, 2))

    assert names(("ox", "ass"), ("a", "b"), ()) == "ox ass"
    assert names((), ("a", "b"), ("0", "1")) == names((), ("0", "1"), ("a", "b")) == "a b"
    assert names((), (), ()) == names((), ("0", "1"), ("0", "1")) == "0 1"
    assert names((), ("all",), ("all",)) == "0 1"  # images of one folder, and a label table


def test_the_figure_names_every_class() -> None:
    """Twenty names below the bars, without overlap."""
    aps = {stage: np.linspace(0.1, 0.9, 20) for stage in ("res4", "res5")}
    fig = svm_plots.class_ap_figure(aps, VOC_CLASSES)
    pixels(fig)
    first, last = fig.axes
    labels = last.get_xticklabels()
    assert [label.get_text() for label in labels] == list(VOC_CLASSES)
    assert not any(label.get_visible() for label in first.get_xticklabels())
    height = labels[0].get_fontsize() * fig.dpi / 72
    ends = [label.get_window_extent().x1 for label in labels]
    # Slanted text: the gap between lines is the step times the sine of the angle.
    assert min(np.diff(ends)) * np.sin(np.radians(labels[0].get_rotation())) > height


def test_the_published_settings() -> None:
    """docs/protocols.md: nineteen costs, 100 to 0.5^19, three folds, positives weighted twice."""
    recipe = voc07_svm()
    assert len(recipe.costs) == 19 and recipe.costs[:3] == (1.0, 10.0, 100.0)
    assert (recipe.costs[3], recipe.costs[-1]) == (0.0625, pytest.approx(1.9e-6, rel=0.01))
    assert (recipe.folds, recipe.positive_weight, recipe.train.crop.size) == (3, 2.0, 224)
    assert recipe.class_names == voc07_lowshot().class_names == VOC_CLASSES
    assert voc07_lowshot().shots == (1, 2, 4, 8, 16, 32, 64, 96) and voc07_lowshot().draws == 5
