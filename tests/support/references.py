"""Reference implementations: slow and literal, to compare results with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from rotpred.svm.low_shot import draw_samples

Rows = npt.NDArray[np.float32]
Unit = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int8]
Ids = npt.NDArray[np.int64]

EXACT_COSTS = (1.0, 10.0, 0.5**4, 0.5**9, 0.5**19)
"""Costs for which liblinear converges to the last digits quickly."""
LOW_COSTS = (0.5, 0.5**4, 0.5**9)
"""Low costs, for the same reason."""


def exact_svc(cost: float) -> LinearSVC:
    """LinearSVC as published, but solved to convergence; the published settings stop earlier."""
    weight = {1: 2, -1: 1}
    return LinearSVC(
        C=cost, class_weight=weight, dual=True, tol=1e-8, max_iter=100_000, random_state=0
    )


def unit_rows(rows: Rows) -> npt.NDArray[np.float64]:
    """Rows divided by their norm plus 1e-5, in float64, as published."""
    wide = rows.astype(np.float64)
    return wide / (np.sqrt((wide**2).sum(1)) + 1e-5)[:, None]


def reference_ap(scores: npt.NDArray[np.float64], truth: npt.NDArray[np.bool_]) -> float:
    """Area under the precision envelope: for each recall, the best precision at or beyond it."""
    ranked = [bool(truth[i]) for i in sorted(range(len(scores)), key=lambda i: -scores[i])]
    found, points = 0, []
    for place, hit in enumerate(ranked, start=1):
        found += hit
        points.append((found / sum(ranked), found / place))
    area, before = 0.0, 0.0
    for recall, _ in points:
        area += (recall - before) * max(p for r, p in points if r >= recall)
        before = recall
    return area


def class_aps(rows: Unit, others: Unit, table: Labels, truths: Labels) -> list[float]:
    """AP of every class (0 to 1) by scikit-learn, with the cost chosen by cross-validation."""
    expected = []
    for labels, truth in zip(table.T, truths.T, strict=True):
        signs = np.where(labels > 0, 1, -1)
        folds = list(StratifiedKFold(3).split(rows, signs))
        means = []
        for cost in LOW_COSTS:
            aps = []
            for fit, held in folds:
                scores = exact_svc(cost).fit(rows[fit], signs[fit]).decision_function(rows[held])
                aps.append(average_precision_score(signs[held] > 0, scores))
            means.append(np.mean(aps))
        model = exact_svc(LOW_COSTS[int(np.argmax(means))]).fit(rows, signs)
        keep = truth != 0
        expected.append(reference_ap(model.decision_function(others[keep]), truth[keep] > 0))
    return expected


def low_shot_maps(
    rows: Unit, others: Unit, table: Labels, truths: Labels, *, shots: int, draws: int
) -> npt.NDArray[np.float64]:
    """mAP of every draw of seed 0 (0 to 1) by scikit-learn; the cost is chosen on the test data."""
    classes = table.shape[1]
    signs = np.repeat([1, -1], [shots, shots * (classes - 1)])
    aps = np.zeros((draws, classes, len(LOW_COSTS)))
    for number, c, j in np.ndindex(aps.shape):
        chosen = draw_samples(table[:, c], shots, classes=classes, seed=(0, number, shots, c))
        model = exact_svc(LOW_COSTS[j]).fit(rows[chosen], signs)
        keep = truths[:, c] != 0
        scores = model.decision_function(others[keep])
        aps[number, c, j] = reference_ap(scores, truths[keep, c] > 0)
    best: npt.NDArray[np.float64] = aps.mean(1)[:, aps.mean((0, 1)).argmax()]
    return best


def knn_hits(
    bank: Rows, queries: Rows, ids: Ids, truth: Ids, k: int, temperature: float, *, cosine: bool
) -> list[int]:
    """Top-1 and top-5 hits, one query at a time. Ties go to lower rows and classes."""
    hits = [0, 0]
    for query, target in zip(queries.astype(np.float64), truth, strict=True):
        rows = bank.astype(np.float64)
        if cosine:
            rows = rows / np.linalg.norm(rows, axis=1)[:, None]
            query = query / np.linalg.norm(query)
        similar = rows @ query
        near = sorted(range(len(rows)), key=lambda i: (-similar[i], i))[:k]
        votes: dict[int, float] = {}
        for i in near:
            votes[int(ids[i])] = votes.get(int(ids[i]), 0.0) + np.exp(similar[i] / temperature)
        ranked = sorted(votes, key=lambda c: (-votes[c], c))
        for place, top in enumerate((1, 5)):
            hits[place] += int(target) in ranked[:top]
    return hits


def naive_slide(
    logits_of: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, crop: int, stride: int
) -> torch.Tensor:
    """Sliding windows as in mmsegmentation: a grid of windows, each moved back inside the image."""
    height, width = image.shape[2:]
    rows = max(height - crop + stride - 1, 0) // stride + 1
    columns = max(width - crop + stride - 1, 0) // stride + 1
    lists: dict[tuple[int, int], list[torch.Tensor]] = {}
    for row in range(rows):
        for column in range(columns):
            bottom = min(row * stride + crop, height)
            right = min(column * stride + crop, width)
            top, left = max(bottom - crop, 0), max(right - crop, 0)
            logits = logits_of(image[:, :, top:bottom, left:right])[0]
            for y in range(top, bottom):
                for x in range(left, right):
                    lists.setdefault((y, x), []).append(logits[:, y - top, x - left])
    return torch.stack(
        [
            torch.stack([torch.stack(lists[y, x]).mean(0) for x in range(width)], dim=1)
            for y in range(height)
        ],
        dim=1,
    )[None]
