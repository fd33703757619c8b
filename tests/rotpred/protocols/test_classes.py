"""Compatibility of training and test data: the same classes, by name and order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.spec import CenterCrop, RandomResizedCrop
from rotpred.distributed import Rank
from rotpred.protocols import finetune, knn, svm
from rotpred.protocols.classes import number_of_classes
from rotpred.recipes.every import EVALUATION
from rotpred.recipes.finetune import RECIPES, in1k_semi
from rotpred.training.settings import RunSettings
from tests.support.classification_trees import make_trees
from tests.support.images import save_jpeg, smooth_image
from tests.support.run_outputs import results

IDS = ("0", "1", "2")
NAMES = ("abbey", "bar", "yard")


def labelled(data: str, names: tuple[str, ...], high: int) -> Any:
    """What a loader has of names and labels; -1 as the highest is a sample without one."""
    return SimpleNamespace(
        spec=SimpleNamespace(data=data), classes=names, label_range=(min(0, high), high)
    )


@pytest.mark.parametrize(
    ("train", "val", "count"),
    [
        ((NAMES, 2), (NAMES, 1), 3),
        ((IDS, 2), (NAMES, 2), 3),
        ((NAMES, 2), (IDS[:2], 1), 3),
        (((), 2), (NAMES, 0), 3),
        ((IDS, 2), (IDS[:2], 1), 3),
        ((IDS[:2], 1), ((), 6), 7),
    ],
)
def test_ids_go_with_any_names(train: Any, val: Any, count: int) -> None:
    assert number_of_classes(labelled("a", *train), labelled("b", *val)) == count


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        (
            (NAMES, 0),
            (("abbey", "yard"), 0),
            r"\(3 and 2\): number 1 is bar in the first, yard in the second",
        ),
        ((NAMES, 0), (NAMES[:2], 0), "number 2 is yard in the first, missing in the second"),
        ((("1", "10", "2"), 0), (IDS, 0), "number 0 is 1 in the first, 0 in the second"),
        (((*IDS, "3"), 3), (NAMES, 2), "a has label 3, but b has 3 classes, counted from 0"),
        ((NAMES, 0), ((), -1), "b has samples without a label"),
    ],
)
def test_other_classes_are_refused(train: Any, val: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        number_of_classes(labelled("a", *train), labelled("b", *val))


@pytest.mark.timeout(120)
def test_a_list_with_labels_is_tested_on_the_official_archive(tmp_path: Path) -> None:
    """As in the docstring of in1k_semi_1: train_1percent.txt, tested on folders or synsets."""
    trees = make_trees(tmp_path)
    lists, folders = trees["in1k_mhead"], trees["in1k_linear"]
    made, common = RECIPES["in1k_semi_1"](), {"engine": "folder", "workers": 1, "batch_size": 4}
    done = finetune.run(
        replace(
            made,
            weights="random",
            backbone="nin3",
            sync_bn="off",
            train=replace(
                made.train, data=lists.train, root=lists.train_root, max_samples=8,
                crop=RandomResizedCrop(32), **common,
            ),
            val=replace(
                made.val, data=folders.val, root=folders.val_root, crop=CenterCrop(32, 36), **common
            ),
            run=RunSettings(out=str(tmp_path / "run"), epochs=1, precision="fp32", device="cpu"),
        ),
        Rank(),
    )  # fmt: skip
    assert results(done)["top1"]["n"] == len(folders.truth)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["cifar10_knn", "cifar10_svm", "cifar10_lowshot"])
def test_features_of_other_classes_are_refused(name: str, tmp_path: Path) -> None:
    for split, classes in (("train", ("ant", "cat")), ("val", ("ant", "dog"))):
        for label, one in enumerate(classes):
            for i in range(2):
                save_jpeg(tmp_path / split / one / f"{i}.jpg", smooth_image(label, 40, 40))
    made: Any = EVALUATION[name]()
    common: dict[str, Any] = {
        "engine": "folder",
        "workers": 1,
        "batch_size": 2,
        "max_samples": None,
    }
    made = replace(
        made,
        weights="random",
        train=replace(made.train, data=str(tmp_path / "train"), crop=CenterCrop(32, 32), **common),
        val=replace(made.val, data=str(tmp_path / "val"), crop=CenterCrop(32, 32), **common),
        run=replace(made.run, out=str(tmp_path / "run")),
        cache=str(tmp_path / "cache"),
    )
    run = {"cifar10_knn": knn.run, "cifar10_svm": svm.run, "cifar10_lowshot": svm.run_low_shot}
    with pytest.raises(ValueError, match="number 1 is cat in the first, dog in the second"):
        run[name](made, Rank())
    assert not (tmp_path / "run/results.json").exists()


def test_the_published_fractions_only() -> None:
    with pytest.raises(ValueError, match=r"0\.01 or 0\.1"):
        in1k_semi(0.05)
