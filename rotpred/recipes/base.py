"""Fields and data specs that several recipes share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

from pipelines.checks import Checked, NonEmptyStr, PositiveFloat, PositiveInt
from pipelines.spec import CIFAR10, CenterCrop, LoaderSpec, Precision
from rotpred.features.base import Store
from rotpred.models.names import AVGPOOL, BackboneName, StageName
from rotpred.training.settings import Device, RunSettings, SyncBn

RESNET_STAGES: tuple[StageName, ...] = ("stem", "res2", "res3", "res4", "res5", AVGPOOL)

PLAIN = LoaderSpec(views="plain", crop=CenterCrop(), flip=False, shuffle=False, drop_last=False)
"""Every image once and in order: center crop, no flip."""


@dataclass(frozen=True)
class FeatureRun(Checked):
    """Run folder, device and precision of an evaluation that trains no network."""

    out: NonEmptyStr | None = None
    """Run folder; None for runs/NAME."""
    device: Device = "auto"
    """auto (a GPU if there is one), cpu, or cuda."""
    precision: Precision = "fp32"
    """Autocast type of the network: fp32 (no autocast), bf16 or fp16."""
    timeout: PositiveFloat = 1800.0
    """Seconds that a process waits for the others before the job fails."""


class Recipe(Protocol):
    """What every recipe has. Most have `train`, too."""

    @property
    def name(self) -> str:
        """Name of the run in results and in the default run folder."""

    @property
    def backbone(self) -> str:
        """Name of the architecture."""

    @property
    def run(self) -> RunSettings | FeatureRun:
        """Run folder, device, precision; length and checkpoints of a training."""


@dataclass(frozen=True)
class Named(Checked):
    """The field that all recipes share."""

    name: NonEmptyStr = "run"
    """Name of the run in results and in the default run folder."""


@dataclass(frozen=True)
class FromWeights(Named):
    """Fields of recipes that start from pretrained weights."""

    weights: NonEmptyStr | None = None
    """backbone.safetensors, a checkpoint, or another project's file; or "random" (untrained), or
    "imagenet" (torchvision's, trained with labels)."""
    backbone: BackboneName = "resnet50"
    """Architecture of the weights. Detection and segmentation need a ResNet."""


@dataclass(frozen=True)
class Trained(Named):
    """Fields of recipes that train in epochs."""

    sync_bn: SyncBn = "off"
    """Batch norm statistics of what is trained: torch or apex for all GPUs together (SyncBN), off
    for each process alone."""
    eval_every_epochs: PositiveInt = 1
    """Epochs between validations. The last epoch is always validated; its result is reported."""
    run: RunSettings = field(default_factory=RunSettings)
    """Length, precision, logs and checkpoints."""


@dataclass(frozen=True)
class OnFeatures(FromWeights):
    """Fields of recipes that train a classifier on extracted features."""

    train: LoaderSpec = PLAIN
    """Labelled training data. Classes must match the test data's."""
    val: LoaderSpec = PLAIN
    """Labelled test data."""
    cache: NonEmptyStr = "runs/features"
    """Folder of extracted features. Evaluations of the same weights and data share them."""
    store: Store = "float32"
    """Type of the features on disk. float16 halves the space and keeps 11 bits of each value."""
    run: FeatureRun = field(default_factory=FeatureRun)
    """Run folder, device and precision."""


def cifar10_data() -> tuple[LoaderSpec, LoaderSpec]:
    """Return the specs of CIFAR-10's training and test images, without augmentation."""
    spec = replace(PLAIN, batch_size=250, crop=CenterCrop(32, None), normalize=CIFAR10)
    return (
        replace(spec, data="data/cifar10/train.beton"),
        replace(spec, data="data/cifar10/test.beton"),
    )
