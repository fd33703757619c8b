"""The VOC07 protocols: one-vs-rest linear SVMs on frozen features, in full and low-shot."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipelines.loader import Loader
from rotpred.distributed import Rank, all_sum
from rotpred.features.base import Features
from rotpred.metrics.average_precision import average_precision
from rotpred.plots import svm
from rotpred.protocols.feature_session import FeatureSession, open_evaluation, share
from rotpred.protocols.multilabel import Labels, check_counts, labels_of, read_tables
from rotpred.recipes.svm import LowShot, Svm
from rotpred.records.log import RunLog
from rotpred.svm.dual import gram, solve
from rotpred.svm.low_shot import aggregate, scores_of_draw
from rotpred.svm.primal import compact, solve_compact

MAX_SAMPLES = 20_000
"""Training samples whose kernel, 8 bytes for each pair, is held: 3.2 GB."""


def run(recipe: Svm, rank: Rank) -> Path:
    """Choose each class's cost by cross-validation, test every stage, write the run folder.

    Returns:
        The run folder, with the mAP of every stage in results.json.

    Raises:
        ValueError: weights, data and recipe do not fit together, in words.
    """
    stages = recipe.stages
    with open_evaluation(recipe, rank) as evaluation:
        parts, (labels, test_labels), class_names = _prepare(recipe, evaluation)
        classes, n = labels.shape[1], len(test_labels)
        # Difficult samples are negatives here.
        signs = np.where(labels > 0, np.int8(1), np.int8(-1))
        needed = recipe.folds
        check_counts(signs, class_names, "training data", positive=needed, negative=needed)
        check_counts(test_labels, class_names, "test data", positive=1, negative=0)
        units = list(itertools.product(range(len(stages)), range(classes)))
        with evaluation.begin(len(units)) as log:
            if log is None:
                return evaluation.out
            # AP, 11-point AP, chosen cost; each rank fills in its own classes.
            found = torch.zeros(len(stages), classes, 3, dtype=torch.float64)
            tick = Ticker(log)
            for stage, numbers, kernel, test, rows in _work(parts, rank, stages, units):
                for c in numbers:
                    found[stage, c] = torch.tensor(
                        one_class(kernel, test, labels[:, c], test_labels[:, c], recipe, rows),
                        dtype=torch.float64,
                    )
                    tick()
            found = all_sum(found, rank)
            for name, (ap, eleven, cost) in zip(stages, found.mT.tolist(), strict=True):
                evaluation.result(
                    log,
                    f"mAP/{name}",
                    float(np.mean(ap)),
                    n=n,
                    classes=list(class_names),
                    per_class=ap,
                    costs=cost,
                )
                evaluation.result(log, f"mAP11/{name}", float(np.mean(eleven)), n=n)
            aps = dict(zip(stages, found[:, :, 0].numpy(), strict=True))
            if rank.main:
                log.figure("per_class", svm.per_class(aps, class_names))
    return evaluation.out


def one_class(
    kernel: torch.Tensor,
    test: torch.Tensor,
    labels: npt.NDArray[np.int8],
    test_labels: npt.NDArray[np.int8],
    recipe: Svm,
    rows: torch.Tensor | None = None,
) -> tuple[float, float, float]:
    """Choose the cost of one class by cross-validation, refit, test.

    Source: mmselfsup, tools/benchmarks/classification/svm_voc07/tools/{train_svm_kfold_parallel,
    test_svm}.py. Difficult samples (0) are negatives here, and are left out of the test. Theirs
    stops liblinear at its tolerance or after 2000 passes; this is the exact optimum.

    Args:
        kernel: float64 (N, N), `gram` of the training samples.
        test: float64 (M, N), of the test samples with them.
        labels: int8 (N,).
        test_labels: int8 (M,).
        recipe: costs, folds, weight of positives.
        rows: float64 (N, d), `compact` of the training samples.

    Returns:
        AP as published, 11-point AP, and the cost.

    There must be as many positives and negatives as folds, and a positive in the test data
    (`labels.check_counts`).
    """
    # Here, as it takes a second and a half, which every other job would wait for.
    from sklearn.metrics import average_precision_score
    from sklearn.model_selection import StratifiedKFold

    signs = np.where(labels > 0, 1.0, -1.0)
    costs = torch.tensor(recipe.costs, dtype=torch.float64, device=kernel.device)
    precision = np.zeros((recipe.folds, len(costs)))
    # As cross_val_score(cv=3): stratified, in the order of the samples.
    folds = StratifiedKFold(recipe.folds).split(np.zeros(len(signs)), signs)
    for fold, (fit, held) in enumerate(folds):
        beta = _fit(kernel, rows, fit, signs, costs, recipe.positive_weight)
        scores = kernel[held][:, fit] @ beta
        precision[fold] = [
            average_precision_score(signs[held] > 0, s.numpy()) for s in scores.T.cpu()
        ]
    best = int(precision.mean(axis=0).argmax())
    every = np.arange(len(signs))
    beta = _fit(kernel, rows, every, signs, costs[best : best + 1], recipe.positive_weight)
    keep = test_labels != 0
    scores = (test @ beta)[:, 0].cpu().numpy()[keep]
    return (*average_precision(scores, test_labels[keep] > 0), recipe.costs[best])


def run_low_shot(recipe: LowShot, rank: Rank) -> Path:
    """Train on few samples per class, several draws of them, test every stage.

    Returns:
        The run folder, with mean and deviation of the mAP of every stage and number of shots.

    Raises:
        ValueError: weights, data and recipe do not fit together, in words.
    """
    stages, shots = recipe.stages, recipe.shots
    units = list(itertools.product(range(len(stages)), range(recipe.draws)))
    with open_evaluation(recipe, rank) as evaluation:
        parts, (labels, test_labels), class_names = _prepare(recipe, evaluation)
        classes, most = labels.shape[1], max(shots)
        others = most * (classes - 1)
        check_counts(labels, class_names, "training data", positive=most, negative=others)
        check_counts(test_labels, class_names, "test data", positive=1, negative=0)
        with evaluation.begin(len(units) * len(shots) * classes) as log:
            if log is None:
                return evaluation.out
            shape = (len(stages), recipe.draws, len(shots), classes, len(recipe.costs))
            scores = torch.zeros(shape, dtype=torch.float64)
            tick = Ticker(log)
            for stage, numbers, kernel, test, rows in _work(parts, rank, stages, units):
                for number in numbers:
                    part = scores_of_draw(
                        kernel,
                        test,
                        labels,
                        test_labels,
                        shots=shots,
                        costs=recipe.costs,
                        positive_weight=recipe.positive_weight,
                        seed=(recipe.seed, number),
                        tick=tick,
                        rows=rows,
                    )
                    scores[stage, number] = torch.from_numpy(part)
            scores = all_sum(scores, rank)
            results = {
                name: aggregate(part.numpy(), recipe.costs)
                for name, part in zip(stages, scores, strict=True)
            }
            for name, of_shots in results.items():
                for k, row in zip(shots, of_shots, strict=True):
                    evaluation.result(
                        log,
                        f"mAP/{name}/k={k}",
                        row.mean,
                        n=len(test_labels),
                        deviation=100 * row.deviation,
                        lowest=100 * row.lowest,
                        highest=100 * row.highest,
                        cost=row.cost,
                        draws=recipe.draws,
                    )
            if rank.main:
                log.figure("low_shot", svm.low_shot_curve(results, shots))
    return evaluation.out


class Ticker:
    """Tells that one more is done."""

    def __init__(self, log: RunLog) -> None:
        self._log, self._done = log, 0

    def __call__(self) -> None:
        self._done += 1
        self._log.tick(self._done)


def _fit(
    kernel: torch.Tensor,
    rows: torch.Tensor | None,
    chosen: npt.NDArray[np.int64],
    signs: npt.NDArray[np.float64],
    costs: torch.Tensor,
    positive_weight: float,
) -> torch.Tensor:
    """Return beta (len(chosen), len(costs)) of the problem on some of the training samples."""
    y = torch.from_numpy(signs[chosen]).to(kernel.device)
    weights = torch.where(y > 0, positive_weight, 1.0)
    if rows is not None and rows.shape[1] < len(chosen):
        return solve_compact(rows[chosen], y, weights, costs)
    part = kernel[chosen][:, chosen] if len(chosen) < len(kernel) else kernel
    return solve(part[None], y[None], weights[None], costs)[0]


def _prepare(
    recipe: Svm | LowShot, evaluation: FeatureSession
) -> tuple[tuple[Features, Features], tuple[Labels, Labels], tuple[str, ...]]:
    """Features and labels of training and test data, and the names of their classes.

    Files of labels are read first: the work on images may take hours.
    """
    if evaluation.samples > MAX_SAMPLES:
        raise ValueError(
            f"{evaluation.samples} training samples are more than {MAX_SAMPLES}: choose some of "
            "them with --train.max-samples"
        )
    paths = (recipe.train_labels, recipe.val_labels)
    tables, classes = read_tables(paths, evaluation.data)
    names = _class_names(recipe, evaluation.data, classes)
    parts = evaluation.features(recipe.stages)
    labels, test_labels = (
        labels_of(part, table, classes) for part, table in zip(parts, tables, strict=True)
    )
    return parts, (labels, test_labels), names


def _class_names(
    recipe: Svm | LowShot, data: tuple[Loader, Loader], classes: int
) -> tuple[str, ...]:
    """What the columns of the labels are called: as the recipe says, else as the data do.

    Raises:
        ValueError: the recipe has another number of names.
    """
    if recipe.class_names and len(recipe.class_names) != classes:
        raise ValueError(
            f"{len(recipe.class_names)} class_names for labels of {classes} classes: "
            "--class-names NAME ..., or --class-names alone for the data's own"
        )
    numbers = tuple(map(str, range(classes)))
    given = (recipe.class_names, *(part.classes for part in data))
    return next((names for names in given if len(names) == classes and names != numbers), numbers)


def _work(
    parts: tuple[Features, Features],
    rank: Rank,
    stages: Sequence[str],
    units: Sequence[tuple[int, int]],
) -> Iterator[tuple[int, list[int], torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Yield this rank's work: a stage, the numbers that go with it, its kernels and rows."""
    mine = units[share(len(units), rank)]
    device = rank.device
    for stage, group in itertools.groupby(mine, key=lambda unit: unit[0]):
        train, val = (part.stages[stages[stage]] for part in parts)
        kernel, test = gram(train, train, device), gram(val, train, device)
        yield stage, [number for _, number in group], kernel, test, compact(train, device)
