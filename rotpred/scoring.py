"""Exact accuracy of classifiers over a validation set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pipelines.loader import Loader
from rotpred.distributed import Rank
from rotpred.metrics import TopK

Scores = dict[str, dict[str, float]]
"""Metrics (top1, top5, n) by classifier; shares are from 0 to 1."""


def number_of_classes(train: Loader, val: Loader) -> int:
    """Number of classes, which training and validation data must share by name and order.

    Raises:
        ValueError: the data carry no labels, or not the same ones.
    """
    highest = 0
    for part in (train, val):
        low, high = part.label_range
        if low < 0:
            raise ValueError(f"{part.spec.data} has samples without a label")
        highest = max(highest, high)
    if train.classes and val.classes and train.classes != val.classes:
        raise ValueError(
            f"{train.spec.data} and {val.spec.data} have different classes "
            f"({len(train.classes)} and {len(val.classes)})"
        )
    # A beton that stock FFCV wrote has labels, but no names for them.
    return max(highest + 1, len(train.classes))


@torch.no_grad()
def score(
    val: Loader,
    rank: Rank,
    names: Sequence[str],
    logits_of: Callable[[torch.Tensor], Sequence[torch.Tensor]],
) -> Scores:
    """Top-1, and top-5 where there are more than five classes, of every classifier by name.

    Args:
        val: plain views; every valid sample of an epoch counts once.
        rank: all ranks call, and get the same.
        names: of the classifiers.
        logits_of: images of a batch to one (N, classes) per classifier.
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
