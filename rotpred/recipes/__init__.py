"""What a run does: frozen dataclasses, with the functions that return them beside.

Building a recipe touches no file and no device. Derived values (the scaled learning rate) are
computed where they are used, never written back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from pipelines.spec import CenterCrop, LoaderSpec
from rotpred.features.extract import Store
from rotpred.training.optim import Optim
from rotpred.training.schedule import Schedule, Steps
from rotpred.training.settings import Run

__all__ = ["Linear", "Pretrain", "Probe", "ProbeKind", "Run"]


@dataclass(frozen=True)
class Pretrain:
    """Pretraining by rotation prediction."""

    name: str = "pretrain"
    """Names the run in results and in the default run folder."""
    backbone: str = "resnet50"
    """resnet50, resnet18, resnet18_small, resnet18_tiny, alexnet, nin3, nin4 or nin5."""
    train: LoaderSpec = field(default_factory=LoaderSpec)
    """Training data."""
    val: LoaderSpec | None = None
    """Validation data, all of it, four views of each image. None (in Python): no validation."""
    optim: Optim = field(default_factory=Optim)
    """Optimiser."""
    schedule: Schedule = field(default_factory=Steps)
    """Learning rate over time."""
    sync_bn: Literal["off", "torch", "apex"] = "off"
    """Batch norm statistics over all GPUs (torch's or apex's SyncBN) or over each process's own."""
    eval_every: int = 1
    """Epochs between validations; the last epoch is always validated."""
    run: Run = field(default_factory=Run)
    """Length, precision, logs and checkpoints."""


ProbeKind = Literal["avgpool", "stages", "conv", "nonlinear"]


@dataclass(frozen=True)
class Probe:
    """Classifiers on frozen features, trained side by side in one pass of the trunk."""

    kind: ProbeKind = "avgpool"
    """avgpool: Linear on the globally averaged last map. stages: pool, batch norm without affine
    parameters and Linear on every stage. conv, nonlinear: the RotNet authors' probes of every
    stage (three convolutions, or two hidden layers of 200)."""
    optim: Optim = field(default_factory=lambda: Optim(lr=30.0, weight_decay=0.0))
    """Optimiser of these classifiers; others have their own."""
    schedule: Schedule = field(default_factory=lambda: Steps((60, 80)))
    """Learning rate over time."""
    lrs: tuple[float, ...] = ()
    """Learning rates to compare: each classifier is trained with every one of them in the same
    pass, called NAME@LR, and the best on the validation data is named. Empty: optim.lr alone."""
    affine: bool = False
    """Whether the batch norm of stages has affine parameters (VISSL) or not (mmselfsup)."""

    def __post_init__(self) -> None:
        if any(not (math.isfinite(lr) and lr > 0) for lr in self.lrs):
            raise ValueError(f"lrs must be positive, got {self.lrs}")
        if len(set(self.lrs)) < len(self.lrs):
            raise ValueError(f"lrs must differ, got {self.lrs}")
        if self.affine and self.kind != "stages":
            raise ValueError(f"affine is for stages, not for {self.kind}")


@dataclass(frozen=True)
class Linear:
    """Classification with a frozen trunk."""

    name: str = "linear"
    """Names the run in results and in the default run folder."""
    weights: str = ""
    """backbone.safetensors, a checkpoint or another project's file, "random", or "imagenet":
    torchvision's, trained with labels."""
    backbone: str = "resnet50"
    """The architecture of the weights."""
    train: LoaderSpec = field(default_factory=lambda: LoaderSpec(views="plain"))
    """Labelled training data."""
    val: LoaderSpec = field(
        default_factory=lambda: LoaderSpec(
            views="plain", crop=CenterCrop(), flip=False, shuffle=False, drop_last=False
        )
    )
    """Labelled validation data."""
    probes: tuple[Probe, ...] = (Probe(),)
    """Sets of classifiers; all are trained in the same pass, each set by its own optimiser."""
    cache: str = ""
    """Folder of features (runs/features, say): those of the training pictures under the crop of the
    validation are extracted once, and the probes (avgpool and stages) are trained on these. That
    takes seconds where they stay in memory, as those of small data sets; larger ones are read from
    the disk in every epoch (in1k_mhead: 226 GB as float32). Without random crops, flips and
    colours: numbers differ from the published protocol's. Empty: augmented pictures go through the
    trunk in every epoch."""
    cache_store: Store = "float32"
    """Type of the features in the cache: float16 takes half the space, and 11 bits of each value;
    results say so. The probes compute in float32."""
    eval_every: int = 10
    """Epochs between validations; the last epoch is always validated, and is what counts."""
    run: Run = field(default_factory=lambda: Run(epochs=100))
    """Length, precision, logs and checkpoints."""
