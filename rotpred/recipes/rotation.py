"""Recipes that score a checkpoint's own rotation head: source and command of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.spec import LoaderSpec
from rotpred.recipes.base import FeatureRun
from rotpred.recipes.pretrain import rotnet_cifar10_nin, rotnet_in1k_r50


@dataclass(frozen=True)
class Rotation:
    """The pretext task's accuracy: nothing is trained."""

    name: str = "rotation_head"
    """Names the run in results and in the default run folder."""
    weights: str = ""
    """A checkpoint with its rotation head: checkpoints/step_N.pt of a run, mmselfsup's, VISSL's or
    the RotNet authors' file; or "random"."""
    backbone: str = "resnet50"
    """The architecture of the weights."""
    labels: Literal["file", "clockwise", "counter-clockwise"] = "file"
    """Which way the head's label 1 turns. file: as the file shows; files of mmselfsup may not, of
    which 1.x is clockwise and 0.x counter-clockwise."""
    val: LoaderSpec = field(
        default_factory=lambda: LoaderSpec(flip=False, shuffle=False, drop_last=False)
    )
    """Validation data, four views of each image."""
    run: FeatureRun = field(default_factory=FeatureRun)
    """Where it works."""


def in1k_rotation() -> Rotation:
    """ImageNet-1k: which of four ways was each validation image turned? ResNet-50.

    Source: the validation of `rotnet_in1k_r50`, on anybody's weights.
    Command: torchrun --nproc-per-node 1 scripts/evaluate.py in1k_rotation --weights FILE
    (--backbone alexnet for the RotNet authors' and VISSL's AlexNet)
    Published: AlexNet of the authors about 89 %.
    """
    val = rotnet_in1k_r50().val
    assert val is not None
    return Rotation(name="in1k_rotation", val=val)


def cifar10_rotation() -> Rotation:
    """CIFAR-10: which of four ways was each test image turned? The authors' NIN.

    Source: the validation of `rotnet_cifar10_nin`, on anybody's weights.
    Command: torchrun --nproc-per-node 1 scripts/evaluate.py cifar10_rotation --weights FILE
    Published: 93.65 (a rerun of the authors' code).
    """
    pretext = rotnet_cifar10_nin()
    assert pretext.val is not None
    return Rotation(name="cifar10_rotation", backbone=pretext.backbone, val=pretext.val)


RECIPES = {recipe.__name__: recipe for recipe in (in1k_rotation, cifar10_rotation)}
