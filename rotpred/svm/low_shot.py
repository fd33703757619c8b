"""Low-shot classification with the linear SVM: random few-sample training sets and their scores.

Source: mmselfsup, tools/dataset_converters/create_voc_low_shot_challenge_samples.py and tools/
benchmarks/classification/svm_voc07/tools/{test_svm_low_shot,aggregate_low_shot_svm_stats}.py;
VISSL, svm_low_shot_trainer.py, is the same. Theirs draws samples without a seed; ours has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipelines.arrays import Float64, Int64
from rotpred.metrics.average_precision import average_precision
from rotpred.svm.primal import Kernels

_CHUNK = 1 << 25
"""Number of kernel values that are solved together: 256 MB of float64."""


def draw_samples(
    labels: npt.NDArray[np.int8], k: int, *, classes: int, seed: Sequence[int]
) -> Int64:
    """Draw k positive and (classes - 1) * k negative samples of one class, as published.

    Args:
        labels: int8 (N,): 1, -1 or 0 (difficult, never drawn).
        k: Number of positives.
        classes: Number of classes; negatives are as many as if each other class gave k.
        seed: Seed of the draw; must differ between classes, shots and draws.

    Returns:
        int64 (classes * k,): row numbers, positives first.

    Raises:
        ValueError: There are too few samples.
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
    kernels: Kernels,
    labels: npt.NDArray[np.int8],
    test_labels: npt.NDArray[np.int8],
    *,
    shots: Sequence[int],
    costs: Sequence[float],
    positive_weight: float,
    seed: Sequence[int],
    tick: Callable[[], None],
) -> Float64:
    """Train and test every class for every number of shots and every cost, in one draw.

    Args:
        kernels: Of N training and M test samples.
        labels: int8 (N, C).
        test_labels: int8 (M, C); difficult samples (0) are left out class by class.
        shots: Numbers of positives k.
        costs: Costs C of the SVM.
        positive_weight: Factor on the cost of positives.
        seed: Seed of this draw.
        tick: Called after each class.

    Returns:
        Average precision as published, float64 (len(shots), C, len(costs)).

    Raises:
        ValueError: A class has too few samples.
        RuntimeError: The solver does not converge, or values are not finite.
    """
    classes = labels.shape[1]
    device = kernels.train.device
    grid = torch.tensor(costs, dtype=torch.float64, device=device)
    result = np.zeros((len(shots), classes, len(costs)))
    for shot, k in enumerate(shots):
        rows = [
            draw_samples(labels[:, c], k, classes=classes, seed=(*seed, k, c))
            for c in range(classes)
        ]
        drawn = torch.from_numpy(np.stack(rows)).to(device)
        signs = torch.full(drawn.shape, -1.0, dtype=torch.float64, device=device)
        signs[:, :k] = 1
        together = max(1, _CHUNK // drawn.shape[1] ** 2)
        for first in range(0, classes, together):
            part = slice(first, first + together)
            beta = kernels.fit(drawn[part], signs[part], grid, positive_weight=positive_weight)
            for c, (chosen, solution) in enumerate(zip(drawn[part], beta, strict=True), first):
                decisions = (kernels.test[:, chosen] @ solution).cpu().numpy()
                keep = test_labels[:, c] != 0
                positive = test_labels[keep, c] > 0
                for j, column in enumerate(decisions[keep].T):
                    result[shot, c, j] = average_precision(column, positive)[0]
                tick()
    return result


@dataclass(frozen=True)
class ShotResult:
    """Statistics over the draws, for one number of shots."""

    mean: float
    """Mean AP over classes, averaged over the draws; 0 to 1."""
    deviation: float
    """Population standard deviation over the draws (ddof 0)."""
    lowest: float
    highest: float
    cost: float
    """The cost with the highest mean on the TEST set, as published: slightly optimistic."""


def aggregate(scores: Float64, costs: Sequence[float]) -> list[ShotResult]:
    """Average over classes and draws; choose one cost per number of shots, as published.

    Args:
        scores: float64 (draws, shots, classes, costs), stacked from `scores_of_draw`.
        costs: Costs along the last axis.

    Returns:
        One result per number of shots.
    """
    means = scores.mean(axis=2)
    results = []
    for k, best in enumerate(means.mean(axis=0).argmax(axis=1)):
        draws = means[:, k, best]
        numbers = (draws.mean(), draws.std(), draws.min(), draws.max(), costs[best])
        results.append(ShotResult(*map(float, numbers)))
    return results
