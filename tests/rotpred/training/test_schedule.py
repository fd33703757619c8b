"""Learning rates against the published tables and torch's schedulers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rotpred.training.schedule import Cosine, Poly, Schedule, Steps, Table, Triangle, lr_at

pytestmark = pytest.mark.timeout(60)

MMSELFSUP = Steps((30, 50), warmup_epochs=5)
VISSL = Steps((30, 60, 90, 100))
ALEXNET = Table(((15, 0.01), (30, 1e-3), (45, 1e-4), (50, 1e-5)))
NIN = Table(((60, 0.1), (120, 0.02), (160, 0.004), (200, 0.0008)))


@pytest.mark.parametrize(
    ("schedule", "base", "epochs", "expected"),
    [
        (MMSELFSUP, 0.2, 70, {5: 0.2, 29.999: 0.2, 30: 0.02, 49.999: 0.02, 50: 0.002, 70: 0.002}),
        (VISSL, 0.1, 105, {0: 0.1, 30: 1e-2, 60: 1e-3, 90: 1e-4, 99.9: 1e-4, 100: 1e-5}),
        (ALEXNET, 0.01, 50, {0: 0.01, 14.99: 0.01, 15: 1e-3, 30: 1e-4, 44.9: 1e-4, 45: 1e-5}),
        (NIN, 0.1, 200, {0: 0.1, 60: 0.02, 119.9: 0.02, 120: 0.004, 160: 0.0008, 200: 0.0008}),
    ],
)
def test_published_pretraining_rates(
    schedule: Schedule, base: float, epochs: int, expected: dict[float, float]
) -> None:
    got = {epoch: lr_at(schedule, base, epoch, epochs) for epoch in expected}
    assert got == pytest.approx(expected, rel=1e-9)


def test_warmup_of_mmselfsup_is_linear_from_a_tenth() -> None:
    # 0.02 -> 0.2 over 5 epochs, at every step.
    steps_per_epoch = 10_010
    got = [lr_at(MMSELFSUP, 0.2, step / steps_per_epoch, 70) for step in (0, 10_010, 25_025)]
    assert got == pytest.approx([0.02, 0.056, 0.11])
    assert lr_at(MMSELFSUP, 0.2, 5 - 1 / steps_per_epoch, 70) < 0.2


def test_a_table_scales_with_the_base_rate() -> None:
    assert lr_at(NIN, 0.2, 60, 200) == pytest.approx(0.04)
    with pytest.raises(ValueError, match="ascending"):
        Table(((30, 0.1), (10, 0.01)))
    with pytest.raises(ValueError, match="empty"):
        Table(())


def test_cosine_follows_torch() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=100, eta_min=0.003)
    for epoch in range(101):
        ours = lr_at(Cosine(final=0.01), 0.3, epoch, 100)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        sgd.step()
        theirs.step()
    warm = Cosine(warmup_epochs=10)
    values = [lr_at(warm, 1.0, epoch, 100) for epoch in (0, 5, 10, 55, 100)]
    assert values == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-12)


def test_poly_follows_torch() -> None:
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    theirs = torch.optim.lr_scheduler.PolynomialLR(sgd, total_iters=40, power=0.9)
    for step in range(41):
        assert lr_at(Poly(), 0.01, step, 40) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        sgd.step()
        theirs.step()
    # mmsegmentation's minimum is absolute: 1e-4 for a base of 0.01.
    assert lr_at(Poly(final=0.01), 0.01, 40, 40) == pytest.approx(1e-4)


def test_triangle() -> None:
    schedule = Triangle(warmup=0.25, start=0.2, final=0.1)
    values = [lr_at(schedule, 2.0, epoch, 16) for epoch in (0, 2, 4, 10, 16, 99)]
    assert values == pytest.approx([0.4, 1.2, 2.0, 1.1, 0.2, 0.2])
    assert lr_at(Triangle(warmup=0.0), 1.0, 0, 10) == 1.0


def test_impossible_times_are_refused() -> None:
    for epoch, epochs in ((-0.1, 10), (0, 0)):
        with pytest.raises(ValueError, match="is not in a run of"):
            lr_at(Steps(), 1.0, epoch, epochs)
