"""Changed recipes: differences from the published recipe are shown with the results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rotpred.distributed import Rank
from rotpred.protocols import dense
from rotpred.recipes.every import EVALUATION, PRETRAINING
from rotpred.records.recipe_json import plain
from rotpred.report.build import page
from rotpred.report.page import markdown
from rotpred.report.recipe_changes import PROCESSES, recipe_changes
from rotpred.report.results import read_runs


def kept(recipe: object) -> dict[str, object]:
    """A recipe as read back from a run folder."""
    value: dict[str, object] = json.loads(json.dumps(plain(recipe)))
    return value


@pytest.mark.parametrize("name", sorted({**PRETRAINING, **EVALUATION}))
def test_a_recipe_does_not_depart_from_itself(name: str) -> None:
    recipe = kept({**PRETRAINING, **EVALUATION}[name]())
    for processes in (None, PROCESSES.get(name, 3)):
        assert recipe_changes(recipe, processes=processes) == ()


@pytest.mark.parametrize(
    ("name", "processes", "changes", "words"),
    [
        ("in1k_linear", 1, {}, ("32 images per update (recipe: 256)",)),
        ("in1k_linear", 4, {"batch_size": 64}, ()),
        ("in1k_semi_10", 2, {"batch_size": 64}, ("128 images per update (recipe: 256)",)),
        ("rotnet_in1k_r50", 2, {"batch_size": 64}, ()),
        ("coco_det", 8, {"batch_size": 4}, ("32 images per update (recipe: 16)",)),
        ("coco_det", 16, {"batch_size": 1}, ()),
        ("voc12aug_seg", 3, {"batch_size": 4}, ("12 images per update (recipe: 16)",)),
        ("cifar10_linear", 2, {}, ()),  # our own: no number of processes was published
        ("cifar10_linear", 2, {"batch_size": 32}, ("train.batch_size 32 (recipe: 64)",)),
        ("voc07_svm", 4, {"batch_size": 16}, ()),  # nothing is trained on batches
    ],
)
def test_the_batch_of_an_update_counts_however_many_processes_share_it(
    name: str, processes: int, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    made: Any = {**PRETRAINING, **EVALUATION}[name]()
    made = replace(made, train=replace(made.train, **changes))
    if name in ("coco_det", "voc12aug_seg"):  # as `dense.run` stores it
        made = dense.scaled(made, Rank(world=processes))
    assert recipe_changes(kept(made), processes=processes) == words


def test_gradients_that_are_added_up_count_as_well() -> None:
    made: Any = PRETRAINING["rotnet_in1k_r50"]()
    made = replace(made, run=replace(made.run, accumulate=4))
    assert recipe_changes(kept(made), processes=2) == ()
    assert recipe_changes(kept(made), processes=8) == ("512 images per update (recipe: 128)",)
    coco: Any = EVALUATION["coco_det"]()
    coco = replace(coco, run=replace(coco.run, accumulate=2))
    coco = dense.scaled(coco, Rank(world=4))
    assert coco.train.steps_per_epoch == 14660
    assert recipe_changes(kept(coco), processes=4) == ()
    longer = replace(coco, train=replace(coco.train, steps_per_epoch=14670))
    assert recipe_changes(kept(longer), processes=4) == (
        "train.steps_per_epoch 14670 (recipe: 7330)",
    )


def test_what_decides_is_told_and_the_rest_is_not() -> None:
    made: Any = EVALUATION["in1k_semi_1"]()
    made = replace(
        made,
        weights="x.pth",
        fraction=0.1,
        train=replace(made.train, data="mine", workers=3, engine="dali", batch_size=32),
        val=replace(made.val, batch_size=7, max_samples=50),
        optim=replace(made.optim, nesterov=True),
        run=replace(made.run, out="here", device="cpu", precision="bf16", log_every_steps=1),
    )
    assert recipe_changes(kept(made), processes=None) == (
        "run.precision bf16 (recipe: fp32)",
        "fraction 0.1 (recipe: 0.01)",
        "train.batch_size 32 (recipe: 64)",
        "val.max_samples 50 (recipe: none)",
        "optim.nesterov True (recipe: False)",
    )


def test_lists_and_types() -> None:
    knn: Any = EVALUATION["in1k_knn"]()
    assert recipe_changes(kept(replace(knn, neighbours=(200,))), processes=8) == (
        "neighbours 200 (recipe: 10 20 100 200)",
    )
    linear: Any = EVALUATION["in1k_linear"]()
    other = replace(linear, train=replace(linear.train, crop=linear.val.crop))
    assert "train.crop.type CenterCrop (recipe: RandomResizedCrop)" in recipe_changes(
        kept(other), processes=8
    )
    probe = replace(linear.probes[0], lrs=(1.0, 2.0))
    assert recipe_changes(kept(replace(linear, probes=(probe,))), processes=8) == (
        "probes.0.lrs 1.0 2.0 (recipe: none)",
    )


def test_other_names_and_older_files_are_passed_over() -> None:
    assert recipe_changes({}, processes=1) == ()
    assert recipe_changes({"name": "nobody's", "fraction": 3}, processes=1) == ()
    assert (
        recipe_changes({"name": "in1k_semi_1", "gone": 3, "optim": {"gone": 1}}, processes=4) == ()
    )


def test_the_page_marks_them(tmp_path: Path) -> None:
    """Changes are named next to the published number, separately for trained and random weights."""
    for weights, neighbours in (("random", (10, 20, 100, 200)), ("a.safetensors", (20,))):
        out = tmp_path / weights
        out.mkdir()
        made: Any = EVALUATION["in1k_knn"]()
        made = replace(made, weights=weights, neighbours=neighbours)
        row = {"benchmark": made.name, "recipe": made.name, "metric": "top1/k=20", "value": 5.0,
               "unit": "%", "n": 10, "weights": weights, "checkpoint_sha256": None}  # fmt: skip
        for file, value in (("results", [row]), ("recipe", kept(made)), ("done", {})):
            (out / f"{file}.json").write_text(json.dumps(value))
    runs = [run for weights in ("random", "a.safetensors") for run in read_runs(tmp_path / weights)]
    text = markdown(page(runs), folder=tmp_path)
    assert "†: a.safetensors: neighbours 20 (recipe: 10 20 100 200)." in text
    assert "| 5.00† | 5.00 |" in text
