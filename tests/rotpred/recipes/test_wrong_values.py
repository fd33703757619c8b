"""Every dataclass that a person fills refuses a wrong value when it is built."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from pipelines.checks import Checked
from pipelines.conversion.encode import Options
from pipelines.dense.spec import DenseSpec, FitWithin, RatioCrop, ShortSide
from pipelines.spec import (
    CenterCrop,
    ColorJitter,
    LoaderSpec,
    Normalize,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Shard,
)
from rotpred.models.detection.settings import Proposals
from rotpred.recipes.base import FeatureRun
from rotpred.recipes.detection import Detection
from rotpred.recipes.every import EVALUATION, PRETRAINING
from rotpred.recipes.finetune import FineTuning
from rotpred.recipes.knn import Knn
from rotpred.recipes.linear import Linear
from rotpred.recipes.pretrain import Pretrain
from rotpred.recipes.probe import Probe
from rotpred.recipes.rotation import Rotation
from rotpred.recipes.segmentation import Segmentation
from rotpred.recipes.svm import LowShot, Svm
from rotpred.records.recipe_json import plain
from rotpred.training.schedule import Cosine, Poly, Steps, Table, Triangle
from rotpred.training.settings import Optim, RunSettings

NAN, INFINITY = float("nan"), float("inf")

RECIPES = {
    Pretrain, Linear, FineTuning, Svm, LowShot, Knn, Rotation, Detection, Segmentation,
}  # fmt: skip


def parts(kind: Any) -> Iterator[type]:
    """Yield the dataclasses that a type consists of, from the outside in."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        yield kind
        for hint in get_type_hints(kind).values():
            yield from parts(hint)
    for arg in get_args(kind):
        yield from parts(arg)


FILLED = sorted(
    {part for recipe in RECIPES for part in parts(recipe)} | {Shard, Options},
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize(
    ("kind", "field", "value", "words"),
    [
        (LoaderSpec, "views", "two", "must be rotate4 or plain, got 'two'"),
        (LoaderSpec, "views", "simclr", "must be rotate4 or plain, got 'simclr'"),
        (LoaderSpec, "views", "rotate", "got 'rotate': did you mean rotate4?"),
        (LoaderSpec, "resize", "gpu", "must be cpu or device, got 'gpu'"),
        (LoaderSpec, "decoder", "gpu", "must be auto, cpu or mixed, got 'gpu'"),
        (LoaderSpec, "engine", "fcv", "folder or synthetic, got 'fcv': did you mean ffcv?"),
        (LoaderSpec, "data", 3, "must be a string, got 3"),
        (LoaderSpec, "data", None, "must be a string, got None"),
        (LoaderSpec, "crop", 224, "must be RandomResizedCrop, RandomCrop, CenterCrop or Resize"),
        (LoaderSpec, "flip", 1, "must be True or False, got 1"),
        (LoaderSpec, "normalize", "imagenet", "must be Normalize, got 'imagenet'"),
        (LoaderSpec, "seed", -1, "must be at least 0 and at most 9223372036854775807, got -1"),
        (
            LoaderSpec,
            "seed",
            2**70,
            "must be at least 0 and at most 9223372036854775807, got 11",
        ),
        (LoaderSpec, "seed", 1.5, "must be a whole number, got 1.5"),
        (LoaderSpec, "batch_size", 0, "must be at least 1, got 0"),
        (LoaderSpec, "batch_size", True, "must be a whole number, got True"),
        (LoaderSpec, "samples", 0, "must be at least 1, got 0"),
        (LoaderSpec, "max_samples", 0, "must be at least 1, got 0"),
        (LoaderSpec, "samples_per_class", 0, "must be at least 1, got 0"),
        (LoaderSpec, "workers", -1, "must be at least 0, got -1"),
        (LoaderSpec, "max_undecodable", -1, "must be at least 0, got -1"),
        (LoaderSpec, "timeout", 0, "must be above 0, got 0"),
        (LoaderSpec, "timeout", INFINITY, "must be a finite number, got inf"),
        pytest.param(
            *(LoaderSpec, "timeout", 10**400, "must be a finite number, got 1000"), id="no-float"
        ),
        (LoaderSpec, "hw_decoder_load", 1.5, "must be at least 0 and at most 1, got 1.5"),
        (LoaderSpec, "cpu_budget", 0, "must be above 0 and at most 1, got 0"),
        (LoaderSpec, "resolution_schedule", (0, 128), "[0] must be a tuple of 2 values"),
        (LoaderSpec, "resolution_schedule", ((5, 128),), "rising epochs from 0 on"),
        (
            LoaderSpec,
            "resolution_schedule",
            ((0, 500),),
            "at most crop.size (224), got",
        ),
        (LoaderSpec, "color_jitter", ColorJitter(hue=0.1), "color_jitter needs views=plain"),
        (RandomResizedCrop, "size", (224, 224), "must be a whole number, got (224, 224)"),
        (RandomResizedCrop, "scale", (1.0, 0.08), "must be in ascending order, got (1.0, 0.08)"),
        (RandomResizedCrop, "scale", (0.0, 1.0), "[0] must be above 0 and at most 1, got 0.0"),
        (RandomResizedCrop, "ratio", (2, 1), "must be in ascending order, got (2, 1)"),
        (RandomResizedCrop, "ratio", 1.0, "must be a tuple of 2 values, each a finite number"),
        (RandomCrop, "padding", -1, "must be at least 0, got -1"),
        (RandomCrop, "resize", 0, "must be at least 1, got 0"),
        (CenterCrop, "size", 0, "must be at least 1, got 0"),
        (Resize, "size", "224", "must be a whole number, got '224'"),
        (ColorJitter, "brightness", -0.1, "must be at least 0, got -0.1"),
        (ColorJitter, "hue", 0.6, "must be at least 0 and at most 0.5, got 0.6"),
        (Normalize, "mean", (0.5, 0.5), "must be a tuple of 3 values, each a finite number"),
        (Normalize, "std", (1, 1, 0), "[2] must be above 0, got 0"),
        (Shard, "rank", 1, "rank 1 is not in a world of 1"),
        (Shard, "world", 0, "must be at least 1, got 0"),
        (Options, "quality", 101, "must be at least 1 and at most 100, got 101"),
        (Options, "check", "none", "must be scan or header, got 'none'"),
        (DenseSpec, "geometry", 512, "must be ShortSide, FitWithin or RatioCrop, got 512"),
        (DenseSpec, "classes", "cat", "must be a tuple, each value a string, got 'cat'"),
        (DenseSpec, "divisor", 0, "must be at least 1, got 0"),
        (DenseSpec, "seed", -1, "must be at least 0 and at most 9223372036854775807, got -1"),
        (
            DenseSpec,
            "seed",
            2**63,
            "must be at least 0 and at most 9223372036854775807, got 92",
        ),
        (DenseSpec, "timeout", -1, "must be above 0, got -1"),
        (ShortSide, "lengths", (), "must not be empty, got ()"),
        (FitWithin, "long", 0, "must be at least 1, got 0"),
        (RatioCrop, "ratio", (2.0, 0.5), "must be in ascending order, got (2.0, 0.5)"),
        (RatioCrop, "most", 0, "must be above 0 and at most 1, got 0"),
        (RunSettings, "precision", "float16", "must be fp32, bf16 or fp16, got 'float16'"),
        (RunSettings, "device", "gpu", "must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (RunSettings, "out", "", "must not be empty, got ''"),
        (LoaderSpec, "root", "", "must not be empty, got ''"),
        (Pretrain, "backbone", "resnet51", "got 'resnet51': did you mean resnet50"),
        (Knn, "weights", "", "must not be empty, got ''"),
        (Knn, "stage", "res9", "got 'res9': did you mean res5"),
        (Svm, "stages", ("x",), "[0] must be stem, res2,"),
        (RunSettings, "epochs", 0, "must be at least 1, got 0"),
        (RunSettings, "profile", -1, "must be at least 0, got -1"),
        (RunSettings, "keep_checkpoints", 1, "must be at least 2, got 1"),
        (FeatureRun, "precision", "half", "must be fp32, bf16 or fp16, got 'half'"),
        (FeatureRun, "timeout", 0, "must be above 0, got 0"),
        (Optim, "lr", NAN, "must be a finite number, got nan"),
        (Optim, "momentum", 1, "must be at least 0 and below 1, got 1"),
        (Optim, "decay_rule", "norm", "must be all, no_norm or no_norm_no_bias, got 'norm'"),
        (Optim, "kind", "lars", 'lars needs decay_rule="no_norm_no_bias"'),
        (Steps, "milestones", (-1,), "[0] must be at least 0, got -1"),
        (Steps, "gamma", 0, "must be above 0, got 0"),
        (Table, "pairs", (), "must not be empty, got ()"),
        (Table, "pairs", ((1, 0.0),), "[0][1] must be above 0, got 0.0"),
        (Cosine, "final", -0.1, "must be at least 0, got -0.1"),
        (Triangle, "warmup", 1, "must be at least 0 and below 1, got 1"),
        (Poly, "power", -1, "must be at least 0, got -1"),
        (Proposals, "anchors", (0,), "[0] must be at least 1, got 0"),
        (Proposals, "before", (100,), "must be a tuple of 2 values, each a whole number"),
        (Proposals, "pooled", 7, "must be at least 2 and even, got 7"),
        (Probe, "kind", "stage", "got 'stage': did you mean stages?"),
        (Probe, "lrs", (0.1, 0.1), "must not repeat a value, got (0.1, 0.1)"),
        (Pretrain, "sync_bn", "of", "must be off, torch or apex, got 'of': did you mean off?"),
        (Pretrain, "eval_every_epochs", 0, "must be at least 1, got 0"),
        (Linear, "probes", (), "must not be empty, got ()"),
        (Linear, "eval_every_epochs", 0, "must be at least 1, got 0"),
        (FineTuning, "fraction", 0, "must be above 0 and at most 1, got 0"),
        (FineTuning, "lrs", (), "must not be empty and not repeat a value, got ()"),
        (FineTuning, "head_lr_mult", 0, "must be above 0, got 0"),
        (Knn, "neighbours", (0,), "[0] must be at least 1, got 0"),
        (Knn, "temperature", 0, "must be above 0, got 0"),
        (Knn, "store", "float", "must be float32 or float16, got 'float'"),
        (Svm, "costs", (0.0,), "[0] must be above 0, got 0.0"),
        (Svm, "stages", ("res4", "res4"), "must not be empty and not repeat a value"),
        (Svm, "folds", 1, "must be at least 2, got 1"),
        (LowShot, "shots", (), "must not be empty, got ()"),
        (LowShot, "seed", -1, "must be at least 0 and at most 9223372036854775807, got -1"),
        (
            LowShot,
            "seed",
            2**63,
            "must be at least 0 and at most 9223372036854775807, got 92",
        ),
        (Rotation, "labels", "ccw", "must be file, clockwise or counter-clockwise, got 'ccw'"),
        (Detection, "model", "fcn", "must be faster_rcnn_c4 or mask_rcnn_fpn, got 'fcn'"),
        (Segmentation, "dropout", 1.0, "must be at least 0 and below 1, got 1.0"),
        (Segmentation, "slide_stride", 800, "slide_stride must be at most slide_crop"),
    ],
)
def test_a_wrong_value_names_field_choices_and_range(
    kind: type, field: str, value: object, words: str
) -> None:
    with pytest.raises(ValueError) as met:
        kind(**{field: value})
    message = str(met.value)
    assert words in message and "\n" not in message
    if words.startswith(("must", "[", "got")):  # rules about two fields need not name the class
        assert message.startswith(f"{kind.__name__}.{field}")


@pytest.mark.parametrize("kind", FILLED, ids=lambda kind: kind.__name__)
def test_no_field_takes_an_object_of_no_meaning(kind: type) -> None:
    assert issubclass(kind, Checked)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=rf"^{kind.__name__}\.{field.name}(\[0\])* must be "):
            kind(**{field.name: object()})


@pytest.mark.parametrize("name", [*PRETRAINING, *EVALUATION])
def test_every_recipe_is_built_and_its_paths_may_be_paths(name: str) -> None:
    recipe = {**PRETRAINING, **EVALUATION}[name]()
    assert type(recipe) in RECIPES
    spec = dataclasses.replace(recipe.val, data=Path("a/b.beton"), root=Path("c"))
    run = dataclasses.replace(recipe.run, out=Path("runs/x"))
    moved = dataclasses.replace(recipe, val=spec, run=run)
    assert (moved.val.data, moved.val.root, moved.run.out) == ("a/b.beton", "c", "runs/x")
    assert json.loads(json.dumps(plain(moved)))["val"]["data"] == "a/b.beton"
