"""Fields and values that several recipes share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipelines.spec import CIFAR10, CenterCrop, LoaderSpec, Precision
from rotpred.features.base import AVGPOOL

RESNET_STAGES = ("stem", "res2", "res3", "res4", "res5", AVGPOOL)

PLAIN = LoaderSpec(views="plain", crop=CenterCrop(), flip=False, shuffle=False, drop_last=False)
"""Every image once, as it is."""


@dataclass(frozen=True)
class FeatureRun:
    """Where and in which type an evaluation without training of a network works."""

    out: str = ""
    """Run folder; empty for runs/NAME."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, or cuda."""
    precision: Precision = "fp32"
    """Autocast type of the network: fp32 (no autocast), bf16 or fp16."""
    timeout: float = 1800.0
    """Seconds that a process waits for its peers before the job is ended."""


@dataclass(frozen=True)
class CachedFeatureRun(FeatureRun):
    """That, and where features are kept."""

    cache: str = "runs/features"
    """Folder of extracted features, which evaluations of the same weights and data share."""


def cifar10_data() -> tuple[LoaderSpec, LoaderSpec]:
    spec = replace(PLAIN, batch_size=250, crop=CenterCrop(32, None), normalize=CIFAR10)
    return (
        replace(spec, data="data/cifar10/train.beton"),
        replace(spec, data="data/cifar10/test.beton"),
    )
