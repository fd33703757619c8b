"""Learning-rate schedules, as pure functions of time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pipelines.checks import NOT_EMPTY, Checked, NonNegativeFloat, PositiveFloat, at_least, below


@dataclass(frozen=True)
class Steps(Checked):
    """Multiply by gamma at each milestone, after a linear warm-up from start_factor to 1.

    mmselfsup, ResNet-50: milestones 30 and 50 of 70 epochs, 5 epochs of warm-up from 0.1, a new
    value at every step.
    """

    milestones: tuple[NonNegativeFloat, ...] = ()
    """In epochs; the new factor applies from the first step of that epoch."""
    gamma: PositiveFloat = 0.1
    warmup_epochs: NonNegativeFloat = 0.0
    warmup_start_factor: NonNegativeFloat = 0.1


@dataclass(frozen=True)
class Table(Checked):
    """Piecewise constant rates: an epoch takes the first entry whose bound exceeds it, or the last.

    As in the paper's code (algorithms/Algorithm.py, `LUT_lr`). The table gives the shape: its rates
    are scaled so that the first one is the base learning rate. For the authors' tables `Optim.lr`
    therefore repeats the first entry (0.01 for AlexNet, not the nominal 0.1).
    """

    pairs: Annotated[tuple[tuple[NonNegativeFloat, PositiveFloat], ...], NOT_EMPTY]
    """(bound in epochs, learning rate), bounds ascending."""

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds = [bound for bound, _ in self.pairs]
        if bounds != sorted(set(bounds)):
            raise ValueError(f"a table needs ascending bounds, got {self.pairs}")


@dataclass(frozen=True)
class Cosine(Checked):
    """Half a cosine from 1 to `final`, after a linear warm-up."""

    warmup_epochs: NonNegativeFloat = 0.0
    final: NonNegativeFloat = 0.0
    """Share of the base learning rate at the end."""
    warmup_start_factor: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class Triangle(Checked):
    """Linear from `start` to 1 at `warmup` (a fraction of the run), then linear to `final`."""

    warmup: Annotated[float, at_least(0), below(1)] = 0.2
    start: NonNegativeFloat = 0.0
    final: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class Poly(Checked):
    """(1 - t) ** power, from 1 to `final` (segmentation: power 0.9, final 0.01)."""

    power: NonNegativeFloat = 0.9
    final: NonNegativeFloat = 0.0


Schedule = Steps | Table | Cosine | Triangle | Poly


def lr_at(schedule: Schedule, base_lr: float, epoch_float: float, epochs: float) -> float:
    """Return the learning rate at a point in time. A pure function.

    Args:
        schedule: The shape.
        base_lr: Factor of the shape (`Optim.lr_for`).
        epoch_float: Epochs done, with fractions: epoch + step / steps_per_epoch.
        epochs: Length of the run; an `epoch_float` beyond it counts as the end.

    Raises:
        ValueError: `epoch_float` is negative, or `epochs` is not positive.
    """
    if epochs <= 0 or epoch_float < 0:
        raise ValueError(f"epoch {epoch_float} is not in a run of {epochs} epochs")
    now = min(epoch_float, epochs)
    match schedule:
        case Steps():
            passed = sum(now >= milestone for milestone in schedule.milestones)
            factor = schedule.gamma**passed
            factor *= _warmup(now, schedule.warmup_epochs, schedule.warmup_start_factor)
        case Table():
            rates = (lr for bound, lr in schedule.pairs if bound > now)
            factor = next(rates, schedule.pairs[-1][1]) / schedule.pairs[0][1]
        case Cosine():
            if now < schedule.warmup_epochs:
                factor = _warmup(now, schedule.warmup_epochs, schedule.warmup_start_factor)
            else:
                rest = epochs - schedule.warmup_epochs
                t = (now - schedule.warmup_epochs) / rest if rest > 0 else 1.0
                factor = _between(schedule.final, (1 + math.cos(math.pi * t)) / 2)
        case Triangle():
            top = schedule.warmup * epochs
            if now < top:
                factor = _between(schedule.start, now / top)
            else:
                factor = _between(schedule.final, (epochs - now) / (epochs - top))
        case Poly():
            factor = _between(schedule.final, (1 - now / epochs) ** schedule.power)
    return base_lr * factor


def _between(low: float, share: float) -> float:
    """Interpolate linearly from `low` (share 0) to 1 (share 1)."""
    return low + (1 - low) * share


def _warmup(now: float, length: float, start: float) -> float:
    return _between(start, now / length) if now < length else 1.0
