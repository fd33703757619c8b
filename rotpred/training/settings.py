"""Settings that recipes share: the run (length, device, precision, checkpoints), the optimiser."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pipelines.checks import (
    Checked,
    Must,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    at_least,
    below,
)
from pipelines.spec import Precision

DecayRule = Literal["all", "no_norm", "no_norm_no_bias"]

SyncBn = Literal["off", "torch", "apex"]
"""Batch norm statistics: of each process alone, or over all processes by torch or apex."""


Device = Annotated[
    str,
    Must(
        "be auto, cpu, cuda or cuda:N",
        lambda name: re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is not None,
    ),
]
"""Device of a run: auto for a GPU if there is one."""


@dataclass(frozen=True)
class RunSettings(Checked):
    """Run folder, length, device, precision and checkpoints of a run."""

    out: NonEmptyStr | None = None
    """Run folder; None for runs/NAME. If it holds checkpoints, the run resumes from the newest."""
    epochs: PositiveInt = 70
    """Passes over the training data. Learning-rate schedules span them or count them."""
    max_steps: PositiveInt | None = None
    """Stop after this many steps, with the schedule of the full run (smoke tests, benchmarks)."""
    device: Device = "auto"
    """auto (a GPU if there is one), cpu, or cuda."""
    precision: Precision = "bf16"
    """Autocast type: bf16, fp16 (with a gradient scaler) or fp32 (no autocast)."""
    compile: bool = False
    """Compile the network with torch.compile, once per image size. Not with SyncBN."""
    cuda_graph: bool = False
    """Replay forward and backward as one CUDA graph per image size. Helps if the CPU launches
    kernels too slowly. Needs a GPU, and batch norm without SyncBN."""
    accumulate: PositiveInt = 1
    """Gradient accumulation: steps per update of the weights."""
    log_every_steps: PositiveInt = 50
    """Steps between log lines. Apart from SyncBN and detection, only then does the host wait for
    the device."""
    save_every_steps: PositiveInt = 1000
    """Steps between checkpoints. Another one is written at the end of each epoch."""
    profile: NonNegativeInt = 0
    """Steps to profile, shortly after the start, into OUT/profile; 0 for none."""
    keep_checkpoints: Annotated[int, at_least(2)] = 3
    """How many of the newest checkpoints to keep, at least 2, besides the best one."""
    timeout: PositiveFloat = 1800.0
    """Seconds that a process waits for the others before the job fails."""

    def total_steps(self, per_epoch: int) -> int:
        """Return the length of the run: all epochs, or `max_steps` if that is less."""
        total = self.epochs * per_epoch
        return total if self.max_steps is None else min(total, self.max_steps)


@dataclass(frozen=True)
class Optim(Checked):
    """Optimiser and hyperparameters. The defaults are mmselfsup's for RotNet with ResNet-50."""

    lr: PositiveFloat = 0.2
    """Peak learning rate, for `reference_batch` source images per step."""
    momentum: Annotated[float, at_least(0), below(1)] = 0.9
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 1e-4
    decay_rule: DecayRule = "all"
    """all (mmselfsup, the paper's code), no_norm (VISSL: norms excluded, biases included), or
    no_norm_no_bias (LARS)."""
    kind: Literal["sgd", "lars", "apex_sgd"] = "sgd"
    """sgd, lars, or apex_sgd: NVIDIA apex's FusedSGD, which must be installed."""
    reference_batch: PositiveInt | None = None
    """Source images per global step that `lr` is for. The learning rate scales linearly with the
    batch (Goyal et al. 2017, section 2.1). None: no scaling."""
    trust: PositiveFloat = 0.001
    """Trust coefficient of LARS (You et al. 2017, eta); unused by other optimisers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum")
        if self.kind == "lars" and (self.decay_rule != "no_norm_no_bias" or self.nesterov):
            raise ValueError('lars needs decay_rule="no_norm_no_bias" and no nesterov')

    def lr_for(self, source_images: int) -> float:
        """Return the learning rate for a global step of `source_images` images (not views)."""
        if self.reference_batch is None:
            return self.lr
        return self.lr * source_images / self.reference_batch
