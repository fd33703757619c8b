"""Recipes against the published configurations; what a dataclass refuses."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from pipelines.spec import CIFAR10, LoaderSpec, RandomResizedCrop, Shard
from rotpred.backbone import BACKBONES
from rotpred.recipes import Run
from rotpred.recipes.pretrain import (
    RECIPES,
    rotnet_cifar10_nin,
    rotnet_in1k_alexnet,
    rotnet_in1k_r50,
    rotnet_in1k_r50_amp,
    rotnet_in1k_r50_fast,
)
from rotpred.schedule import lr_at

pytestmark = pytest.mark.timeout(60)


def rate(recipe: object, epoch: float, images: int) -> float:
    made = asdict(recipe)  # type: ignore[call-overload]
    lr = recipe.optim.lr_for(images)  # type: ignore[attr-defined]
    return lr_at(recipe.schedule, lr, epoch, made["run"]["epochs"])  # type: ignore[attr-defined]


def test_mmselfsup_resnet50() -> None:
    """8 x 16 images, SGD 0.2 after 5 epochs from 0.02, x0.1 at 30 and 50, 70 epochs, SyncBN."""
    recipe = rotnet_in1k_r50()
    assert recipe.train.batch_size * 8 == 128
    assert recipe.train.crop == RandomResizedCrop(224)
    assert (recipe.sync_bn, recipe.run.epochs, recipe.run.precision) == ("torch", 70, "fp32")
    assert (recipe.optim.momentum, recipe.optim.weight_decay) == (0.9, 1e-4)
    assert recipe.optim.decay_rule == "all" and not recipe.optim.nesterov
    for epoch, lr in ((0, 0.02), (5, 0.2), (29.9, 0.2), (30, 0.02), (50, 0.002), (69, 0.002)):
        assert rate(recipe, epoch, 128) == pytest.approx(lr, rel=0.02), epoch
    assert rate(recipe, 10, 256) == pytest.approx(0.4)


def test_amp_sibling_differs_in_precision_only() -> None:
    plain, mixed = asdict(rotnet_in1k_r50()), asdict(rotnet_in1k_r50_amp())
    changed = {name for name in plain if plain[name] != mixed[name]}
    assert changed == {"name", "run"}
    assert mixed["run"]["precision"] == "bf16"


def test_fast_sibling_spends_a_third_of_the_pixels() -> None:
    recipe, base = rotnet_in1k_r50_fast(), rotnet_in1k_r50()
    sides = [recipe.train.side(epoch) for epoch in range(recipe.run.epochs)]
    assert (sides[0], sides[13], sides[14], sides[27], sides[28]) == (128, 128, 192, 192, 224)
    assert sum((side / 224) ** 2 for side in sides) / base.run.epochs < 0.32
    # The same rate for each image of a step, at the top.
    assert rate(recipe, 5, 1024) / 1024 == pytest.approx(rate(base, 5, 128) / 128)
    assert rate(recipe, 34.99, 1024) < 0.01
    assert recipe.val == base.val and recipe.backbone == base.backbone


@pytest.mark.parametrize(
    ("recipe", "images", "table"),
    [
        (rotnet_in1k_alexnet(), 192, {0: 0.01, 14: 0.01, 15: 1e-3, 30: 1e-4, 45: 1e-5}),
        (rotnet_cifar10_nin(), 128, {0: 0.1, 59: 0.1, 60: 0.02, 120: 0.004, 160: 0.0008}),
    ],
)
def test_the_authors_recipes(recipe: object, images: int, table: dict[int, float]) -> None:
    """Rates of the paper's code, not the nominal 0.1 of its AlexNet file."""
    for epoch, lr in table.items():
        assert rate(recipe, epoch, images) == pytest.approx(lr)
    made = asdict(recipe)  # type: ignore[call-overload]
    assert made["train"]["batch_size"] == images
    assert made["optim"]["nesterov"] and made["optim"]["weight_decay"] == 5e-4


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name and recipe.backbone in BACKBONES
    assert recipe.train.views == "rotate4" and recipe.train.shuffle and recipe.train.drop_last
    assert recipe.val is not None
    assert not (recipe.val.flip or recipe.val.shuffle or recipe.val.drop_last)
    assert recipe.val.normalize == recipe.train.normalize
    assert ("cifar10" in name or name == "quickstart") == (recipe.train.normalize == CIFAR10)


@pytest.mark.parametrize("blocks", [3, 4, 5])
def test_nin_has_as_many_blocks_as_asked(blocks: int) -> None:
    assert rotnet_cifar10_nin(blocks).backbone == f"nin{blocks}"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Run(epochs=0), "epochs"),
        (lambda: Run(keep=1), "keep"),
        (lambda: Run(max_steps=0), "max_steps"),
        (lambda: Run(profile=-1), "profile"),
        (lambda: LoaderSpec(batch_size=0), "batch_size"),
        (lambda: LoaderSpec(limit=0), "limit"),
        (lambda: LoaderSpec(timeout=0), "timeout"),
        (lambda: Shard(2, 2), "rank 2"),
    ],
)
def test_senseless_values_are_refused(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]
