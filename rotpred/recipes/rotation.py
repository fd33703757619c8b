"""Recipes that score a checkpoint's own rotation head. Each docstring: source, command."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.checks import NonEmptyStr
from pipelines.spec import LoaderSpec
from rotpred.recipes.base import FeatureRun, FromWeights
from rotpred.recipes.pretrain import rotnet_cifar10_nin, rotnet_in1k_r50


@dataclass(frozen=True)
class Rotation(FromWeights):
    """Accuracy of a checkpoint's own rotation head; nothing is trained."""

    name: str = "rotation_head"
    weights: NonEmptyStr | None = None
    """A checkpoint that includes its rotation head: checkpoints/step_N.pt of a run, or a file of
    mmselfsup, VISSL or the RotNet authors; or "random"."""
    labels: Literal["file", "clockwise", "counter-clockwise"] = "file"
    """Direction of the head's label 1. file: as the file tells; some of mmselfsup's do not (1.x is
    clockwise, 0.x counter-clockwise)."""
    val: LoaderSpec = field(
        default_factory=lambda: LoaderSpec(flip=False, shuffle=False, drop_last=False)
    )
    """Validation data, four views of each image."""
    run: FeatureRun = field(default_factory=FeatureRun)
    """Run folder, device and precision."""


def in1k_rotation() -> Rotation:
    """ImageNet-1k, ResNet-50: rotation accuracy on the validation images.

    Source: the validation of `rotnet_in1k_r50`, for any weights.
    Command: torchrun --nproc-per-node 1 scripts/evaluate.py in1k_rotation --weights FILE
    (--backbone alexnet for the RotNet authors' and VISSL's AlexNet)
    Published: about 89 % for the authors' AlexNet.
    """
    val = rotnet_in1k_r50().val
    assert val is not None
    return Rotation(name="in1k_rotation", val=val)


def cifar10_rotation() -> Rotation:
    """CIFAR-10, the authors' NIN: rotation accuracy on the test images.

    Source: the validation of `rotnet_cifar10_nin`, for any weights.
    Command: torchrun --nproc-per-node 1 scripts/evaluate.py cifar10_rotation --weights FILE
    Published: 93.65 (a rerun of the authors' code).
    """
    pretext = rotnet_cifar10_nin()
    assert pretext.val is not None
    return Rotation(name="cifar10_rotation", backbone=pretext.backbone, val=pretext.val)


RECIPES = {recipe.__name__: recipe for recipe in (in1k_rotation, cifar10_rotation)}
