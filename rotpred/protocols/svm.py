"""The VOC07 protocols: one-vs-rest linear SVMs on frozen features, with all samples or low-shot."""

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
from rotpred.features.extract import open_extraction_loader
from rotpred.metrics.average_precision import average_precision
from rotpred.plots import svm
from rotpred.protocols.features import extract_both, selectable
from rotpred.protocols.multilabel import Labels, check_counts, labels_of, read_label_tables
from rotpred.protocols.run import Run, open_run
from rotpred.recipes.svm import LowShot, Svm
from rotpred.records.log import RunLog
from rotpred.svm.dual import gram, solve
from rotpred.svm.low_shot import aggregate, scores_of_draw
from rotpred.svm.primal import compact, solve_compact

MAX_SAMPLES = 20_000
"""Largest number of training samples. Their kernel, 8 bytes a pair, takes 3.2 GB of memory."""


def run(recipe: Svm, rank: Rank) -> Path:
    """Choose each class's cost by cross-validation, test every stage, write the run folder.

    Returns:
        The run folder; results.json has the mAP of every stage.

    Raises:
        ValueError: The weights, data and recipe do not fit together.
    """
    stages = recipe.stages
    with open_run(recipe, rank, open_extraction_loader) as run:
        parts, (labels, test_labels), class_names = _prepare(recipe, run)
        classes, n = labels.shape[1], len(test_labels)
        # Difficult samples are negatives in training.
        signs = np.where(labels > 0, np.int8(1), np.int8(-1))
        needed = recipe.folds
        check_counts(signs, class_names, "training data", positive=needed, negative=needed)
        check_counts(test_labels, class_names, "test data", positive=1, negative=0)
        units = list(itertools.product(range(len(stages)), range(classes)))
        if run.start(-(-len(units) // rank.world)):
            # AP, 11-point AP, chosen cost; each rank fills in its own units.
            found = torch.zeros(len(stages), classes, 3, dtype=torch.float64)
            tick = Ticker(run.log)
            for stage, numbers, kernel, test, rows in _work(parts, rank, stages, units):
                for c in numbers:
                    found[stage, c] = torch.tensor(
                        evaluate_class(kernel, test, labels[:, c], test_labels[:, c], recipe, rows),
                        dtype=torch.float64,
                    )
                    tick()
            found = all_sum(found, rank)
            for name, (ap, eleven, cost) in zip(stages, found.mT.tolist(), strict=True):
                run.result(
                    f"mAP/{name}",
                    float(np.mean(ap)),
                    n=n,
                    classes=list(class_names),
                    per_class=ap,
                    costs=cost,
                )
                run.result(f"mAP11/{name}", float(np.mean(eleven)), n=n)
            aps = dict(zip(stages, found[:, :, 0].numpy(), strict=True))
            if rank.main:
                run.log.figure("per_class", svm.class_ap_figure(aps, class_names))
    return run.out


def evaluate_class(
    kernel: torch.Tensor,
    test: torch.Tensor,
    labels: npt.NDArray[np.int8],
    test_labels: npt.NDArray[np.int8],
    recipe: Svm,
    rows: torch.Tensor | None = None,
) -> tuple[float, float, float]:
    """Choose the cost of one class by cross-validation, train on all samples, test.

    Source: mmselfsup, tools/benchmarks/classification/svm_voc07/tools/{train_svm_kfold_parallel,
    test_svm}.py. Difficult samples (0) are negatives in training and are left out of the test.
    liblinear, used there, stops at its tolerance or after 2000 passes; this is the exact optimum.
    There must be at least as many positives and negatives as folds, and a positive in the test data
    (`multilabel.check_counts`).

    Args:
        kernel: float64 (N, N): `gram` of the training samples.
        test: float64 (M, N): `gram` of test and training samples.
        labels: int8 (N,).
        test_labels: int8 (M,).
        recipe: Costs, folds, weight of positives.
        rows: float64 (N, d): `compact` of the training samples, or None.

    Returns:
        AP as published, 11-point AP, and the chosen cost.
    """
    # Imported here because it takes 1.5 seconds, which other jobs do not need.
    from sklearn.metrics import average_precision_score
    from sklearn.model_selection import StratifiedKFold

    signs = np.where(labels > 0, 1.0, -1.0)
    costs = torch.tensor(recipe.costs, dtype=torch.float64, device=kernel.device)
    precision = np.zeros((recipe.folds, len(costs)))
    # As cross_val_score(cv=3): stratified, without shuffling.
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
    """Train on few samples per class, over several draws, and test every stage.

    Returns:
        The run folder; results.json has mean and deviation of the mAP per stage and number of
        shots.

    Raises:
        ValueError: The weights, data and recipe do not fit together.
    """
    stages, shots = recipe.stages, recipe.shots
    units = list(itertools.product(range(len(stages)), range(recipe.draws)))
    with open_run(recipe, rank, open_extraction_loader) as run:
        parts, (labels, test_labels), class_names = _prepare(recipe, run)
        classes, most = labels.shape[1], max(shots)
        others = most * (classes - 1)
        check_counts(labels, class_names, "training data", positive=most, negative=others)
        check_counts(test_labels, class_names, "test data", positive=1, negative=0)
        if run.start(-(-len(units) * len(shots) * classes // rank.world)):
            shape = (len(stages), recipe.draws, len(shots), classes, len(recipe.costs))
            scores = torch.zeros(shape, dtype=torch.float64)
            tick = Ticker(run.log)
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
                    run.result(
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
                run.log.figure("low_shot", svm.low_shot_curve(results, shots))
    return run.out


class Ticker:
    """Counter of finished units that reports to the log."""

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
    """Train on the chosen samples; returns beta, float64 (len(chosen), len(costs))."""
    y = torch.from_numpy(signs[chosen]).to(kernel.device)
    weights = torch.where(y > 0, positive_weight, 1.0)
    if rows is not None and rows.shape[1] < len(chosen):
        return solve_compact(rows[chosen], y, weights, costs)
    part = kernel[chosen][:, chosen] if len(chosen) < len(kernel) else kernel
    return solve(part[None], y[None], weights[None], costs)[0]


def _prepare(
    recipe: Svm | LowShot, run: Run[Loader]
) -> tuple[tuple[Features, Features], tuple[Labels, Labels], tuple[str, ...]]:
    """Return features and labels of training and test data, and the class names.

    Label files are read first, because extraction may take hours.

    Raises:
        ValueError: There are more than `MAX_SAMPLES` training samples, or labels do not fit.
    """
    samples, data = selectable(run.train), (run.train, run.val)
    if samples > MAX_SAMPLES:
        raise ValueError(
            f"{samples} training samples exceed the maximum of {MAX_SAMPLES}: select "
            "some with --train.max-samples"
        )
    paths = (recipe.train_labels, recipe.val_labels)
    tables, classes = read_label_tables(paths, data)
    names = _class_names(recipe, data, classes)
    parts = extract_both(run, recipe.stages, cache=recipe.cache, store=recipe.store)
    labels, test_labels = (
        labels_of(part, table, classes) for part, table in zip(parts, tables, strict=True)
    )
    return parts, (labels, test_labels), names


def _class_names(
    recipe: Svm | LowShot, data: tuple[Loader, Loader], classes: int
) -> tuple[str, ...]:
    """Return the names of the label columns: the recipe's, else the data's, else numbers.

    Raises:
        ValueError: The recipe has the wrong number of names.
    """
    if recipe.class_names and len(recipe.class_names) != classes:
        raise ValueError(
            f"{len(recipe.class_names)} class_names for labels of {classes} classes: "
            "pass --class-names NAME ..., or --class-names alone for the names in the data"
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
    """Yield this rank's work: a stage, its classes or draws, its kernels and its compact rows."""
    mine = units[rank.part_of(len(units))]
    device = rank.device
    for stage, group in itertools.groupby(mine, key=lambda unit: unit[0]):
        train, val = (part.stages[stages[stage]] for part in parts)
        kernel, test = gram(train, train, device), gram(val, train, device)
        yield stage, [number for _, number in group], kernel, test, compact(train, device)
