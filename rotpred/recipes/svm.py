"""Linear SVM recipes. Each docstring: source, command, published result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from pipelines.checks import (
    DISTINCT,
    NOT_EMPTY,
    NonEmptyStr,
    PositiveFloat,
    PositiveInt,
    Seed,
    at_least,
)
from pipelines.datasets.voc_classification import VOC_CLASSES
from pipelines.spec import LoaderSpec, Resize
from rotpred.models.names import StageName
from rotpred.recipes.base import PLAIN, RESNET_STAGES, OnFeatures, cifar10_data
from rotpred.recipes.pretrain import rotnet_cifar10_r18

COSTS = (1.0, 10.0, 100.0, *(0.5**power for power in range(4, 20)))
"""Costs C of the published runs. Their order decides ties (mmselfsup, tools/benchmarks/
classification/svm_voc07/tools/eval_svm_full.sh and svm_helper.py)."""


Costs = Annotated[tuple[PositiveFloat, ...], NOT_EMPTY]


@dataclass(frozen=True)
class _SvmFields(OnFeatures):
    """Fields that `Svm` and `LowShot` share."""

    train_labels: NonEmptyStr | None = None
    """Labels of the training data: an .npy file of int8 (N, C), a row per sample (1 present, -1
    absent, 0 difficult; to_beton writes it), or voc2007:SPLIT, read from the data's root. None:
    the class ids of the data, each class against the rest."""
    val_labels: NonEmptyStr | None = None
    """Labels of the test data, in the same form."""
    class_names: tuple[str, ...] = ()
    """Names of the label columns, for results and figures. Empty: the data's own class names, or
    numbers if their count does not match."""
    stages: Annotated[tuple[StageName, ...], NOT_EMPTY, DISTINCT] = RESNET_STAGES
    """Stages of the backbone, each pooled to about 9,000 values, or avgpool."""
    costs: Costs = COSTS
    """Costs C to train with."""
    positive_weight: PositiveFloat = 2.0
    """Factor on the cost of positive samples."""


@dataclass(frozen=True)
class Svm(_SvmFields):
    """One linear SVM per class and stage; cross-validation chooses its cost."""

    name: str = "svm"
    costs: Costs = COSTS
    """Costs C to choose from. Of equally good ones, the first is chosen."""
    folds: Annotated[int, at_least(2)] = 3
    """Folds of the cross-validation."""


@dataclass(frozen=True)
class LowShot(_SvmFields):
    """Linear SVMs per class and stage on a few samples, over several independent draws."""

    name: str = "lowshot"
    costs: Costs = COSTS
    """Costs C. The one with the highest mean on the test data is reported, as published."""
    shots: Annotated[tuple[PositiveInt, ...], NOT_EMPTY] = (1, 2, 4, 8, 16, 32, 64, 96)
    """Numbers of positives per class. Each has (classes - 1) times as many negatives."""
    draws: PositiveInt = 5
    """Independent draws per number of shots."""
    seed: Seed = 0
    """Seed of the draws."""


def _voc07() -> tuple[LoaderSpec, LoaderSpec]:
    """Return the specs of VOC07's training and test images."""
    spec = replace(PLAIN, batch_size=64, crop=Resize(224))
    return (
        replace(spec, data="data/voc2007/trainval.beton"),
        replace(spec, data="data/voc2007/test.beton"),
    )


def voc07_svm() -> Svm:
    """VOC07 classification, ResNet-50: an SVM on each of the five stages and on the average pool.

    Source: mmselfsup, configs/benchmarks/classification/svm_voc07.py and tools/benchmarks/
    classification/svm_voc07 (19 costs; VISSL has 11). Both resize the short side to 256, then the
    result to 224 x 224 without keeping the aspect ratio; here the image is resized to that in one
    step. The README reports the best stage; results here have all.
    VISSL's costs: --costs 0.01 0.1 1 2 5 10 15 20 50 100 1000
    Command: torchrun --nproc-per-node 1 scripts/evaluate.py voc07_svm --weights FILE
    (without conversion: --train.data voc2007:trainval --train.root VOC2007_FOLDER
    --train-labels voc2007:trainval, and the same for --val with test)
    Published (mmselfsup): mAP 67.70 (feature 4, here res4).
    """
    train, val = _voc07()
    return Svm(
        name="voc07_svm",
        train=train,
        val=val,
        train_labels="data/voc2007/trainval.labels.npy",
        val_labels="data/voc2007/test.labels.npy",
        class_names=VOC_CLASSES,
    )


def voc07_lowshot() -> LowShot:
    """VOC07 low-shot classification, ResNet-50: 1 to 96 positives per class, five draws.

    Source: as `voc07_svm`, and rotpred/svm/low_shot.py. The cost is chosen on the test data, as
    published. The published draws had no seed, so differences of some tenths are noise. The sources
    resize differently: mmselfsup as in `voc07_svm`, VISSL in one step, as here.
    Command: torchrun --nproc-per-node 1 scripts/evaluate.py voc07_lowshot --weights FILE
    Published (mmselfsup): 20.60 / 24.35 / 31.41 / 39.17 / 46.56 / 53.37 / 59.14 / 62.42.
    """
    full = voc07_svm()
    return LowShot(
        name="voc07_lowshot",
        train=full.train,
        val=full.val,
        train_labels=full.train_labels,
        val_labels=full.val_labels,
        class_names=full.class_names,
        stages=("res4", "res5"),
    )


def cifar10_svm() -> Svm:
    """CIFAR-10, each class against the rest, 5,000 labels: `voc07_svm` for small images.

    Source: our own use of the protocol, with as many training images as VOC07 has.
    Command: torchrun --nproc-per-node 1 scripts/evaluate.py cifar10_svm --weights FILE
    """
    train, val = cifar10_data()
    return Svm(
        name="cifar10_svm",
        backbone=rotnet_cifar10_r18().backbone,
        train=replace(train, max_samples=5000),
        val=val,
    )


def cifar10_lowshot() -> LowShot:
    """CIFAR-10, each class against the rest: `voc07_lowshot` for small images.

    Source: our own use of the protocol; samples are drawn from 5,000 labels.
    Command: torchrun --nproc-per-node 1 scripts/evaluate.py cifar10_lowshot --weights FILE
    """
    full = cifar10_svm()
    return LowShot(
        name="cifar10_lowshot",
        backbone=full.backbone,
        train=full.train,
        val=full.val,
        stages=("res3", "res4", "res5"),
    )


RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        voc07_svm,
        voc07_lowshot,
        cifar10_svm,
        cifar10_lowshot,
    )
}
