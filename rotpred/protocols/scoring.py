"""Exact accuracy of classifiers over a validation set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from pipelines.loader import Loader
from pipelines.spec import Precision
from rotpred.distributed import Rank
from rotpred.metrics.classification import Confusion, ConfusionResult, TopK
from rotpred.training.state import autocast

Scores = dict[str, dict[str, float]]
"""Metrics (top1, top5, n) by classifier; shares are from 0 to 1."""

ROTATIONS = 4


class Labelled(NamedTuple):
    """What a data set says of its classes."""

    data: str
    """How messages call it."""
    names: tuple[str, ...]
    """By id. Empty where there are none (stock FFCV's betons); a list of files has ids as text."""
    low: int
    """Smallest label of a sample; -1 stands for none."""
    high: int
    """Largest one."""

    @property
    def unnamed(self) -> bool:
        """Whether ids are all that is known."""
        return self.names == tuple(map(str, range(len(self.names))))


def number_of_classes(train: Loader, val: Loader) -> int:
    """`shared_classes` of what two loaders read."""
    return shared_classes(
        *(Labelled(part.spec.data, part.classes, *part.label_range) for part in (train, val))
    )


def shared_classes(train: Labelled, val: Labelled) -> int:
    """Number of classes, which training and test data must share by name and order.

    Data that have ids only go with any names for them, as many as there are.

    Raises:
        ValueError: the data carry no labels, or not the same ones.
    """
    for part in (train, val):
        if part.low < 0:
            raise ValueError(f"{part.data} has samples without a label")
    for one, other in ((train, val), (val, train)):
        # Folders 0, 1, 10, 2 are in the order of text: those names are no ids.
        numbers = not other.unnamed and all(name.isdecimal() for name in other.names)
        if one.unnamed and not numbers:
            if not other.unnamed and one.high >= len(other.names):
                raise ValueError(
                    f"{one.data} has label {one.high}, but {other.data} has "
                    f"{len(other.names)} classes, which are counted from 0"
                )
            return max(one.high + 1, other.high + 1, len(one.names), len(other.names))
    if train.names != val.names:
        pairs = enumerate(itertools.zip_longest(train.names, val.names, fillvalue="nothing"))
        i, (ours, theirs) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        raise ValueError(
            f"{train.data} and {val.data} have different classes ({len(train.names)} and "
            f"{len(val.names)}): number {i} is {ours} and {theirs}"
        )
    return len(train.names)


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


@torch.no_grad()
def score_rotations(
    net: nn.Module,
    val: Loader,
    rank: Rank,
    precision: Precision,
    *,
    tick: Callable[[int], None] = lambda _done: None,
) -> ConfusionResult:
    """Count predicted against true rotations of every picture, on any number of ranks.

    Args:
        net: images to logits (N, 4), in evaluation mode.
        val: rotate4 views; every valid view of an epoch counts once.
        rank: all ranks call, and get the same.
        precision: of the network.
        tick: told the number of batches that are done.
    """
    counts = Confusion(ROTATIONS, device=rank.device)
    for done, batch in enumerate(val.epoch(0), start=1):
        with autocast(rank.device, precision):
            predicted = net(batch.images).argmax(1)
        counts.update(predicted, batch.targets, batch.valid)
        tick(done)
    return counts.compute(rank)
