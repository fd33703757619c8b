"""Results of validations, and exact accuracy of classifiers on a validation set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pipelines.batch import Batch
from rotpred.distributed import Rank
from rotpred.metrics.classification import Confusion, ConfusionResult, TopK
from rotpred.training.loader_interface import TrainingLoader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROTATIONS = 4
"""Number of rotations to tell apart."""

TOPS = ("top1", "top5")
"""Names of the metrics of `score`."""


@dataclass(frozen=True)
class Validation:
    """Result of a validation, the same on all ranks."""

    results: Mapping[str, float]
    """All metrics by name, from 0 to 1."""
    n: int
    """Number of samples."""
    score: float
    """Selects the best checkpoint: the higher the better."""
    logged: Mapping[str, float]
    """Metrics by name, from 0 to 1, that the log shows during the training."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Figures by name, on the main rank only."""


@torch.no_grad()
def score(
    val: TrainingLoader[Batch],
    rank: Rank,
    names: Sequence[str],
    logits_of: Callable[[torch.Tensor], Sequence[torch.Tensor]],
) -> Validation:
    """Return top-1, and top-5 if there are more than five classes, of every classifier.

    Metrics are called top1/NAME and top5/NAME. The best classifier's top-1 is the score.

    Args:
        val: Plain views; every valid sample of an epoch counts once.
        rank: All ranks call and get the same result.
        names: Names of the classifiers.
        logits_of: Maps the images or features of a batch to logits (N, classes) per classifier.
    """
    counts: TopK | None = None
    for batch in val.epoch(0):
        outputs = logits_of(batch.images)
        if counts is None:
            ks = (1, 5) if outputs[0].shape[1] > 5 else (1,)
            counts = TopK(ks=ks, heads=len(names), device=rank.device)
        counts.update(outputs, batch.targets, batch.valid)
    assert counts is not None
    found = dict(zip(names, counts.compute(rank), strict=True))
    results = {
        f"{top}/{name}": one[top] for name, one in found.items() for top in TOPS if top in one
    }
    top1 = {metric: value for metric, value in results.items() if metric.startswith("top1/")}
    n = int(next(iter(found.values()))["n"])
    return Validation(results, n, max(top1.values()), logged=top1)


@torch.no_grad()
def score_rotations(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    val: TrainingLoader[Batch],
    rank: Rank,
    *,
    tick: Callable[[int], None] = lambda _done: None,
) -> ConfusionResult:
    """Return the confusion of predicted and true rotations, for any number of ranks.

    Args:
        logits_of: Maps images (N, 3, S, S) to logits (N, 4).
        val: rotate4 views; every valid view of an epoch counts once.
        rank: All ranks call and get the same result.
        tick: Called with the number of finished batches.
    """
    counts = Confusion(ROTATIONS, device=rank.device)
    for done, batch in enumerate(val.epoch(0), start=1):
        counts.update(logits_of(batch.images).argmax(1), batch.targets, batch.valid)
        tick(done)
    return counts.compute(rank)
