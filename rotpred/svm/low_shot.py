"""Low-shot classification with the linear SVM: draws of a few labelled samples, their scores.

Source: mmselfsup, tools/dataset_converters/create_voc_low_shot_challenge_samples.py and tools/
benchmarks/classification/svm_voc07/tools/{test_svm_low_shot,aggregate_low_shot_svm_stats}.py;
VISSL, svm_low_shot_trainer.py, is the same. Theirs draws without a seed; ours has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rotpred.metrics.average_precision import average_precision
from rotpred.svm.dual import solve
from rotpred.svm.primal import solve_compact

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

_CHUNK = 1 << 25
"""Values of the kernels that are solved together: 256 MB."""


def draw_samples(
    labels: npt.NDArray[np.int8], k: int, *, classes: int, seed: Sequence[int]
) -> Int64:
    """Draw k positive and (classes - 1) * k negative samples of one class, as published.

    Args:
        labels: (N,), 1, -1 or 0 (difficult, never drawn).
        k: number of positives.
        classes: of the data set: the negatives are as many as if each other class gave k.
        seed: decides the draw; classes, shots and draws are given different ones.

    Returns:
        (classes * k,) rows, the positives first.

    Raises:
        ValueError: there are too few samples.
    """
    generator = np.random.default_rng(list(seed))
    parts = []
    for sign, count in ((1, k), (-1, (classes - 1) * k)):
        found = np.flatnonzero(labels == sign)
        if len(found) < count:
            kind = "positive" if sign == 1 else "negative"
            raise ValueError(f"{k} shots need {count} {kind} samples, a class has {len(found)}")
        parts.append(generator.choice(found, count, replace=False))
    return np.concatenate(parts)


def scores_of_draw(
    kernel: torch.Tensor,
    test: torch.Tensor,
    labels: npt.NDArray[np.int8],
    test_labels: npt.NDArray[np.int8],
    *,
    shots: Sequence[int],
    costs: Sequence[float],
    positive_weight: float,
    seed: Sequence[int],
    tick: Callable[[], None],
    rows: torch.Tensor | None = None,
) -> Float64:
    """Train and test every class at every number of shots and every cost, for one draw.

    Args:
        kernel: float64 (N, N), `linear_svm.gram` of the samples that are drawn from.
        test: float64 (M, N), of the test samples with them.
        labels: int8 (N, C).
        test_labels: int8 (M, C); difficult samples (0) are left out class by class.
        shots: numbers of positives k.
        costs: of the SVM.
        positive_weight: what multiplies the cost of positives.
        seed: of this draw.
        tick: called after each class.
        rows: float64 (N, d), `compact_svm.compact` of the samples that are drawn from.

    Returns:
        Average precision as published, (len(shots), C, len(costs)).
    """
    classes = labels.shape[1]
    device = kernel.device
    grid = torch.tensor(costs, dtype=torch.float64, device=device)
    result = np.zeros((len(shots), classes, len(costs)))
    for place, k in enumerate(shots):
        drawn = torch.from_numpy(
            np.stack(
                [
                    draw_samples(labels[:, c], k, classes=classes, seed=(*seed, k, c))
                    for c in range(classes)
                ]
            )
        ).to(device)
        n = classes * k
        signs = torch.full((n,), -1.0, dtype=torch.float64, device=device)
        signs[:k] = 1
        weights = torch.where(signs > 0, positive_weight, 1.0)
        together = max(1, _CHUNK // n**2)
        for first in range(0, classes, together):
            chunk = drawn[first : first + together]
            if rows is not None and rows.shape[1] < n:
                beta = torch.stack(
                    [solve_compact(rows[chosen], signs, weights, grid) for chosen in chunk]
                )
            else:
                parts = torch.stack([kernel[chosen][:, chosen] for chosen in chunk])
                shape = (len(chunk), n)
                beta = solve(parts, signs.expand(shape), weights.expand(shape), grid)
            for c, (chosen, solution) in enumerate(zip(chunk, beta, strict=True), first):
                decisions = (test[:, chosen] @ solution).cpu().numpy()
                keep = test_labels[:, c] != 0
                positive = test_labels[keep, c] > 0
                for j, column in enumerate(decisions[keep].T):
                    result[place, c, j] = average_precision(column, positive)[0]
                tick()
    return result


@dataclass(frozen=True)
class ShotResult:
    """Of one number of shots, over the draws."""

    mean: float
    """Mean AP over classes, averaged over the draws; 0 to 1."""
    deviation: float
    """Standard deviation over the draws (of them all, not an estimate from a sample)."""
    lowest: float
    highest: float
    cost: float
    """The cost with the highest mean on the TEST set, as published: a little too good."""


def aggregate(scores: Float64, costs: Sequence[float]) -> list[ShotResult]:
    """Average over classes and draws, and choose one cost per number of shots, as published.

    Args:
        scores: (draws, shots, classes, costs), of `scores_of_draw`.
        costs: what the last axis stands for.

    Returns:
        One result per number of shots.
    """
    means = scores.mean(axis=2)
    results = []
    for k in range(scores.shape[1]):
        best = int(means[:, k].mean(axis=0).argmax())
        draws = means[:, k, best]
        results.append(
            ShotResult(
                float(draws.mean()),
                float(draws.std()),
                float(draws.min()),
                float(draws.max()),
                float(costs[best]),
            )
        )
    return results
