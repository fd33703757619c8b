"""Weighted k-nearest-neighbour classification on frozen features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from rotpred.distributed import Rank, all_sum
from rotpred.features.extract import open_extraction_loader
from rotpred.protocols.classes import number_of_classes
from rotpred.protocols.features import extract_both, selectable
from rotpred.protocols.run import open_run
from rotpred.recipes.knn import Knn

BANK_ROWS = 8192
QUERY_ROWS = 1024
"""BANK_ROWS x QUERY_ROWS similarities are computed at once: 32 MB."""

TOPS = (1, 5)
"""k of top-k: a hit has the true class among the k classes with the most votes."""


def run(recipe: Knn, rank: Rank) -> Path:
    """Compute exact top-1 and top-5 for every number of neighbours, write the run folder.

    Returns:
        The run folder.

    Raises:
        ValueError: The weights, data and recipe do not fit together.
    """
    with open_run(recipe, rank, open_extraction_loader) as run:
        classes = number_of_classes(run.train, run.val)
        _check_enough(recipe, selectable(run.train))
        train, val = extract_both(run, (recipe.stage,), cache=recipe.cache, store=recipe.store)
        _check_enough(recipe, len(train.labels))
        if run.start(-(-len(train.labels) // BANK_ROWS)):
            rows = rank.part_of(len(val.labels))
            found = neighbours(
                train.stages[recipe.stage],
                val.stages[recipe.stage][rows],
                k=max(recipe.neighbours),
                normalize=recipe.normalize,
                device=rank.device,
                tick=run.log.tick,
            )
            hits = count_hits(
                *found,
                bank_labels=train.labels,
                labels=val.labels[rows],
                ks=recipe.neighbours,
                temperature=recipe.temperature,
                classes=classes,
            )
            hits, n = all_sum(hits, rank), len(val.labels)
            for k, counts in zip(recipe.neighbours, hits.tolist(), strict=True):
                for top, count in zip(TOPS, counts, strict=True):
                    if top < classes:
                        run.result(f"top{top}/k={k}", count / n, n=n)
    return run.out


def _check_enough(recipe: Knn, samples: int) -> None:
    if max(recipe.neighbours) > samples:
        raise ValueError(
            f"cannot take {max(recipe.neighbours)} neighbours of {samples} training samples"
        )


def neighbours(
    bank: npt.NDArray[np.floating],
    queries: npt.NDArray[np.floating],
    *,
    k: int,
    normalize: bool,
    device: torch.device,
    tick: Callable[[int], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k rows of the bank with the largest dot products. On ties the lower row comes first.

    The bank is read once, in blocks, and may exceed the memory.

    Args:
        bank: Float (M, D), with M at least k.
        queries: Float (Q, D).
        k: Neighbours per query.
        normalize: Scale all rows to unit length first, so that products are cosines.
        device: Device of the computation, which is in float32.
        tick: Called with the number of finished blocks of the bank.

    Returns:
        Similarities float32 (Q, k), descending, and rows int64 (Q, k), on the CPU.
    """

    def rows_of(source: npt.NDArray[np.floating], first: int, count: int) -> torch.Tensor:
        part = np.array(source[first : first + count], dtype=np.float32)
        rows = torch.from_numpy(part).to(device)
        return F.normalize(rows, dim=1) if normalize else rows

    asked = [rows_of(queries, q, QUERY_ROWS) for q in range(0, len(queries), QUERY_ROWS)]
    # One integer key for similarity, then row: `topk` does not define the order of equal floats.
    best = [torch.empty(len(part), 0, dtype=torch.int64, device=device) for part in asked]
    for done, first in enumerate(range(0, len(bank), BANK_ROWS), start=1):
        part = rows_of(bank, first, BANK_ROWS)
        numbers = torch.arange(first, first + len(part), device=device)
        for i, query in enumerate(asked):
            # + 0.0 turns -0.0 into 0.0: equal values must have equal bits.
            bits = (query @ part.T + 0.0).view(torch.int32)
            rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
            keys = torch.cat([best[i], (rising << 32) + (0xFFFFFFFF - numbers)], dim=1)
            best[i] = keys.topk(min(k, keys.shape[1]), dim=1).values
        tick(done)
    keys = torch.cat(best).cpu() if best else torch.empty(0, k, dtype=torch.int64)
    rising = (keys >> 32).int()
    similar = torch.where(rising < 0, rising ^ 0x7FFFFFFF, rising).view(torch.float32)
    return similar, 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def count_hits(
    similar: torch.Tensor,
    rows: torch.Tensor,
    *,
    bank_labels: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    ks: Sequence[int],
    temperature: float,
    classes: int,
) -> torch.Tensor:
    """Count hits of the vote: each neighbour gives exp(similarity / temperature) to its class.

    Source: mmselfsup, mmselfsup/evaluation/functional/knn_eval.py. There, sorting breaks ties, also
    among classes without votes. Here the lower class id wins a tie, and a class without votes is
    not a hit. Votes are relative to the nearest neighbour's: the order is the same, and the
    exponential stays finite for features of any length.

    Args:
        similar: Float (Q, k), descending: similarities from `neighbours`.
        rows: int64 (Q, k): rows from `neighbours`.
        bank_labels: int64 (M,).
        labels: int64 (Q,): true classes.
        ks: Numbers of neighbours that vote, each at most k.
        temperature: T.
        classes: Number of classes.

    Returns:
        int64 (len(ks), 2): numbers of hits, by `TOPS`.
    """
    hits = torch.zeros(len(ks), 2, dtype=torch.int64)
    for first in range(0, len(rows), QUERY_ROWS):
        block = slice(first, first + QUERY_ROWS)
        near = similar[block].double()
        votes = ((near - near[:, :1]) / temperature).exp()
        voters = torch.from_numpy(bank_labels)[rows[block]]
        truth = torch.from_numpy(labels[block])[:, None]
        lower = torch.arange(classes) < truth
        for place, k in enumerate(ks):
            sums = torch.zeros(len(truth), classes, dtype=torch.float64)
            sums.scatter_add_(1, voters[:, :k], votes[:, :k])
            own = sums.gather(1, truth)
            ahead = ((sums > own) | ((sums == own) & lower)).sum(1)
            voted = own[:, 0] > 0
            hits[place] += torch.stack([((ahead < top) & voted).sum() for top in TOPS])
    return hits
