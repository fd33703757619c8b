"""Fields and data specs that several recipes share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipelines.spec import CIFAR10, CenterCrop, LoaderSpec, Precision
from rotpred.features.base import AVGPOOL

RESNET_STAGES = ("stem", "res2", "res3", "res4", "res5", AVGPOOL)

PLAIN = LoaderSpec(views="plain", crop=CenterCrop(), flip=False, shuffle=False, drop_last=False)
"""Every image once and in order: center crop, no flip."""


@dataclass(frozen=True)
class FeatureRun:
    """Run folder, device and precision of an evaluation that trains no network."""

    out: str = ""
    """Run folder; empty for runs/NAME."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, or cuda."""
    precision: Precision = "fp32"
    """Autocast type of the network: fp32 (no autocast), bf16 or fp16."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others before the job fails."""


@dataclass(frozen=True)
class CachedFeatureRun(FeatureRun):
    """The same, with a cache of extracted features."""

    cache: str = "runs/features"
    """Folder of extracted features. Evaluations of the same weights and data share them."""


def cifar10_data() -> tuple[LoaderSpec, LoaderSpec]:
    """Return the specs of CIFAR-10's training and test images, without augmentation."""
    spec = replace(PLAIN, batch_size=250, crop=CenterCrop(32, None), normalize=CIFAR10)
    return (
        replace(spec, data="data/cifar10/train.beton"),
        replace(spec, data="data/cifar10/test.beton"),
    )
