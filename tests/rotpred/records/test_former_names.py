"""Run folders of version 0.1: read and resumed under the present names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rotpred.distributed import Rank
from rotpred.recipes.every import EVALUATION, PRETRAINING
from rotpred.records.folder import read_results, read_rows, what_counts
from rotpred.records.former_names import (
    restore_names,
    translate_names,
    translate_option,
    translate_row,
)
from rotpred.records.recipe_json import plain
from rotpred.report.results import read_runs
from rotpred.training.checkpoint import CheckpointError
from rotpred.training.schedule import Steps
from rotpred.training.settings import Optim, RunSettings
from rotpred.training.state import OptimizedPart, TrainState

KEPT = Path(__file__).parents[3] / "docs" / "results"
OLD = sorted(KEPT.glob("*/*recipe.json"))


def names(value: object, path: str = "") -> set[str]:
    """Every field of nested JSON with its path, and every type."""
    found = set()
    if isinstance(value, dict):
        for key, item in value.items():
            found |= {f"{path}{key}"} | names(item, f"{path}{key}.")
        if "type" in value:
            found.add(f"{path}type={value['type']}")
    return found


@pytest.mark.parametrize("path", OLD, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_kept_recipes_have_the_present_names_after_translation(path: Path) -> None:
    """No field of a recipe of 0.1 is lost: all are fields of today's recipe of that name."""
    old = json.loads(path.read_text())
    today = names(plain({**PRETRAINING, **EVALUATION}[old["name"]]()))
    unknown = {field for field in names(translate_names(old)) if "[" not in field} - today
    # A part that the command changed may be of another type, or be set where it is None today.
    assert not {field for field in unknown if "=" not in field and not field.startswith("val.")}, (
        unknown
    )
    assert translate_names(translate_names(old)) == translate_names(old)


@pytest.mark.parametrize("name", ["cifar10_svm", "cifar10_lowshot", "cifar10_knn"])
def test_evaluations_that_0_2_finished_are_finished(name: str) -> None:
    """As 0.2 wrote them: the cache within `run`, no `store` of SVMs, "" for what is not given."""
    present: Any = {"recipe": plain(EVALUATION[name]()), "weights": "ab", "data": "c", "val": "d"}
    former = json.loads(json.dumps(present))
    recipe = former["recipe"]
    recipe["run"] |= {"cache": recipe.pop("cache"), "out": "runs/x", "type": "CachedFeatureRun"}
    for part in ("train", "val"):
        recipe[part]["root"] = ""
    if name != "cifar10_knn":
        del recipe["store"]
        recipe |= {"train_labels": "", "val_labels": ""}
    former["recipe"]["weights"] = present["recipe"]["weights"] = "w.safetensors"
    assert what_counts(former) == what_counts(present)
    recipe["train"]["seed"] = 1
    assert what_counts(former) != what_counts(present)


def test_the_type_of_cached_features_has_its_present_name() -> None:
    assert translate_names({"cache_store": "float16"}) == {"store": "float16"}


def test_rows_have_the_present_columns(tmp_path: Path) -> None:
    assert translate_row({"head_mult": 10.0, "per_class": [1.0]}) == {
        "head_lr_mult": 10.0,
        "per_class": [1.0],
    }
    (tmp_path / "log.jsonl").write_text('{"step": 1, "wait_percent": 3.0}\n')
    assert read_rows(tmp_path / "log.jsonl") == [{"step": 1, "data_wait_percent": 3.0}]
    (tmp_path / "results.json").write_text('[{"metric": "top1", "head_mult": 1.0}]')
    assert read_results(tmp_path / "results.json") == [{"metric": "top1", "head_lr_mult": 1.0}]


def test_options_of_kept_commands_have_the_present_names() -> None:
    assert translate_option("--train.limit", {}) == "--train.max-samples"
    assert translate_option("--head-mults=1", {}) == "--head-lr-mults=1"
    assert translate_option("--run.cache", {}) == "--cache"
    assert translate_option("--cache-store=float16", {}) == "--store=float16"
    assert translate_option("--train.colour.hue", {}) == "--train.color-jitter.hue"
    assert translate_option("--val.max-bad=1", {"crop"}) == "--val.max-undecodable=1"
    assert translate_option("--val.max-bad=1", {"geometry"}) == "--val.max-invalid-annotations=1"
    commands = [run.command for run in read_runs(KEPT / "rotnet_cifar10_r18")]
    assert any("--train.max-samples" in command for command in commands)
    assert not any("limit" in command for command in commands)


@pytest.mark.parametrize("name", sorted({**PRETRAINING, **EVALUATION}))
def test_present_names_are_not_those_of_the_past(name: str) -> None:
    """Else a present option would be refused. And keys of kept files can be made from them."""
    made = plain({**PRETRAINING, **EVALUATION}[name]())
    assert translate_names(made) == made
    assert translate_names(restore_names(made)) == made


def test_kept_grids_are_labelled_by_the_present_name() -> None:
    rows = [row for run in read_runs(KEPT / "cifar10_transfer") for row in run.results]
    best = [row.row for row in rows if "chosen_from" in row.row and "fraction" in row.row]
    assert best and all("head_lr_mult" in row and "head_mult" not in row for row in best)


def test_checkpoints_resume(tmp_path: Path) -> None:
    """What must match is compared under the present names; another value is still refused."""

    def state(identity: dict[str, Any]) -> TrainState:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        parts = [OptimizedPart(model, Optim(lr=0.1), Steps())]
        run = RunSettings(precision="fp32")
        return TrainState(
            model, parts, rank=Rank(), run=run, folder=tmp_path, global_batch=4,
            identity={"backbone": "linear", **identity},
        )  # fmt: skip

    old = {
        "val": {"geometry": {"kind": "Within", "width": 8}, "max_bad": 2},
        "sides": [[0, 16]], "limit": None, "per_class": 5, "max_bad": 0, "head_mult": 10.0,
    }  # fmt: skip
    first = state(old)
    first.step = 3
    first.save()
    present = {
        "val": {"geometry": {"kind": "FitWithin", "width": 8}, "max_invalid_annotations": 2},
        "resolution_schedule": [[0, 16]], "max_samples": None, "samples_per_class": 5,
        "max_undecodable": 0, "head_lr_mult": 10.0,
    }  # fmt: skip
    resumed = state(present)
    resumed.resume()
    assert resumed.step == 3
    with pytest.raises(CheckpointError, match=r"head_lr_mult: 10\.0 there, 1\.0 now"):
        state({**present, "head_lr_mult": 1.0}).resume()
