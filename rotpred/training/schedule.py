"""Learning rates as a pure function of time."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Steps:
    """Multiply by gamma at each milestone, after a linear warm-up from start_factor to 1.

    mmselfsup, ResNet-50: milestones 30 and 50 of 70 epochs, 5 epochs of warm-up from 0.1, a new
    value at every step.
    """

    milestones: tuple[float, ...] = ()
    """In epochs; the new factor holds from the first step of that epoch on."""
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    warmup_start_factor: float = 0.1


@dataclass(frozen=True)
class Table:
    """The rate of an epoch is that of the first entry whose bound lies above it, else the last one.

    As in the paper's code (algorithms/Algorithm.py, `LUT_lr`). The table gives the shape: its rates
    are scaled so that the first one is the base learning rate, which for the authors' own tables
    means that `Optim.lr` repeats the first entry (0.01 for AlexNet, not the nominal 0.1).
    """

    pairs: tuple[tuple[float, float], ...]
    """(bound in epochs, learning rate), bounds ascending."""

    def __post_init__(self) -> None:
        bounds = [bound for bound, _ in self.pairs]
        if not bounds or bounds != sorted(set(bounds)) or min(lr for _, lr in self.pairs) <= 0:
            raise ValueError(f"a table needs ascending bounds and positive rates, got {self.pairs}")


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 to `final` at the end, after a linear warm-up."""

    warmup_epochs: float = 0.0
    final: float = 0.0
    """Share of the base learning rate that is left at the end."""
    warmup_start_factor: float = 0.0


@dataclass(frozen=True)
class Triangle:
    """Linear from `start` up to 1 at `warmup` (a share of the run), then linear down to `final`."""

    warmup: float = 0.2
    start: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the run in [0, 1), got {self.warmup}")


@dataclass(frozen=True)
class Poly:
    """(1 - t) ** power, from 1 to `final` (segmentation: power 0.9, final 0.01)."""

    power: float = 0.9
    final: float = 0.0


Schedule = Steps | Table | Cosine | Triangle | Poly


def lr_at(schedule: Schedule, base_lr: float, epoch_float: float, epochs: float) -> float:
    """Return the learning rate at a point in time. Pure: equal arguments, equal answer.

    Args:
        schedule: the shape.
        base_lr: what the shape is multiplied with (`Optim.lr_for`).
        epoch_float: epochs done, with fractions: epoch + step / steps_per_epoch.
        epochs: length of the run; an `epoch_float` beyond it counts as its end.

    Raises:
        ValueError: negative time, or a run without length.
    """
    if epochs <= 0 or epoch_float < 0:
        raise ValueError(f"cannot place epoch {epoch_float} in a run of {epochs} epochs")
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
    """Return the point that lies `share` of the way from `low` to 1."""
    return low + (1 - low) * share


def _warmup(now: float, length: float, start: float) -> float:
    return _between(start, now / length) if now < length else 1.0
