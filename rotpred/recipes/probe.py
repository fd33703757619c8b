"""Settings of probes: kind, optimiser, schedule, learning rates to compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pipelines.checks import DISTINCT, Checked, PositiveFloat
from rotpred.training.schedule import Schedule, Steps
from rotpred.training.settings import Optim

ProbeKind = Literal["avgpool", "stages", "conv", "nonlinear"]


@dataclass(frozen=True)
class Probe(Checked):
    """Classifiers on frozen features, all trained in one pass of the backbone."""

    kind: ProbeKind = "avgpool"
    """avgpool: linear, on the average-pooled last feature map. stages: pooling, batch norm (see
    affine) and linear, on every stage. conv, nonlinear: the RotNet authors' probes of every stage,
    with three convolutions or two hidden layers of 200."""
    optim: Optim = field(default_factory=lambda: Optim(lr=30.0, weight_decay=0.0))
    """Optimiser of these classifiers."""
    schedule: Schedule = field(default_factory=lambda: Steps((60, 80)))
    """Learning rate over time."""
    lrs: Annotated[tuple[PositiveFloat, ...], DISTINCT] = ()
    """Learning rates to compare. Each classifier is trained with all of them in the same pass, as
    NAME@LR; the best on the validation data is reported. Empty: optim.lr only."""
    affine: bool = False
    """Whether the batch norm of stages has affine parameters (VISSL) or not (mmselfsup)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.affine and self.kind != "stages":
            raise ValueError(f"affine applies to kind stages, not to {self.kind}")
