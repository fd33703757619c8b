"""Exact accuracy of classifiers on a validation set, and its rows in the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipelines.batch import Batch
from pipelines.spec import Precision
from rotpred.distributed import Rank
from rotpred.metrics.classification import Confusion, ConfusionResult, TopK
from rotpred.records.log import RunLog
from rotpred.training.loader_interface import TrainingLoader
from rotpred.training.precision import autocast

Scores = dict[str, dict[str, float]]
"""Metrics (top1, top5, n) by classifier; top1 and top5 are from 0 to 1."""

ROTATIONS = 4
"""Number of rotations to tell apart."""


@torch.no_grad()
def score(
    val: TrainingLoader[Batch],
    rank: Rank,
    names: Sequence[str],
    logits_of: Callable[[torch.Tensor], Sequence[torch.Tensor]],
) -> Scores:
    """Return top-1, and top-5 if there are more than five classes, of every classifier by name.

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
    return dict(zip(names, counts.compute(rank), strict=True))


def log_scores(
    log: RunLog, benchmark: str, metrics: Mapping[str, float], *, suffix: str = "", **extra: Any
) -> None:
    """Add the results of one classifier of `score`, in percent.

    Args:
        log: The log of the run.
        benchmark: As in `RunLog.result`.
        metrics: top1 and, if it was counted, top5, from 0 to 1; n.
        suffix: Appended to the names of the metrics, for example "/res4".
        extra: Other arguments of `RunLog.result`.
    """
    for name in ("top1", "top5"):
        if name in metrics:
            log.result(
                benchmark,
                metric=f"{name}{suffix}",
                value=100 * metrics[name],
                unit="%",
                n=int(metrics["n"]),
                **extra,
            )


@torch.no_grad()
def score_rotations(
    net: nn.Module,
    val: TrainingLoader[Batch],
    rank: Rank,
    precision: Precision,
    *,
    tick: Callable[[int], None] = lambda _done: None,
) -> ConfusionResult:
    """Return the confusion of predicted and true rotations, for any number of ranks.

    Args:
        net: Maps images (N, 3, S, S) to logits (N, 4); in evaluation mode.
        val: rotate4 views; every valid view of an epoch counts once.
        rank: All ranks call and get the same result.
        precision: Autocast type of the network.
        tick: Called with the number of finished batches.
    """
    counts = Confusion(ROTATIONS, device=rank.device)
    for done, batch in enumerate(val.epoch(0), start=1):
        with autocast(rank.device, precision):
            predicted = net(batch.images).argmax(1)
        counts.update(predicted, batch.targets, batch.valid)
        tick(done)
    return counts.compute(rank)
