"""The VOC07 protocols: one-vs-rest linear SVMs on frozen features, in full and low-shot."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from rotpred import figures
from rotpred.compact_svm import compact, solve_compact
from rotpred.distributed import Rank, all_sum
from rotpred.frozen import Evaluation, Labels, classes_of, labels_of, open_evaluation, share
from rotpred.linear_svm import average_precision, gram, solve
from rotpred.low_shot import ShotResult, aggregate, scores_of_draw
from rotpred.recipes.frozen import LowShot, Svm
from rotpred.runlog import RunLog

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
    with open_evaluation(recipe, rank, stages=stages) as evaluation:
        labels, test_labels = _labels(recipe, evaluation)
        classes = labels.shape[1]
        class_names = _class_names(recipe, evaluation, classes)
        units = list(itertools.product(range(len(stages)), range(classes)))
        with evaluation.begin(len(units)) as log:
            if log is None:
                return evaluation.out
            # AP, 11-point AP, chosen cost; each rank fills in its own classes.
            found = torch.zeros(len(stages), classes, 3, dtype=torch.float64)
            tick = Ticker(log)
            for stage, numbers, kernel, test, rows in _work(evaluation, stages, units):
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
                    classes=list(class_names),
                    per_class=ap,
                    costs=cost,
                )
                evaluation.result(log, f"mAP11/{name}", float(np.mean(eleven)))
            aps = dict(zip(stages, found[:, :, 0].numpy(), strict=True))
            if rank.main:
                log.figure("per_class", per_class(aps, class_names))
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

    Raises:
        ValueError: fewer positives than folds, or none in the test data.
    """
    signs = np.where(labels > 0, 1.0, -1.0)
    if min((signs > 0).sum(), (signs < 0).sum()) < recipe.folds:
        raise ValueError(f"a class has fewer positives or negatives than {recipe.folds} folds")
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
    with open_evaluation(recipe, rank, stages=stages) as evaluation:
        labels, test_labels = _labels(recipe, evaluation)
        classes = labels.shape[1]
        _class_names(recipe, evaluation, classes)
        with evaluation.begin(len(units) * len(shots) * classes) as log:
            if log is None:
                return evaluation.out
            shape = (len(stages), recipe.draws, len(shots), classes, len(recipe.costs))
            scores = torch.zeros(shape, dtype=torch.float64)
            tick = Ticker(log)
            for stage, numbers, kernel, test, rows in _work(evaluation, stages, units):
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
                        deviation=100 * row.deviation,
                        lowest=100 * row.lowest,
                        highest=100 * row.highest,
                        cost=row.cost,
                        draws=recipe.draws,
                    )
            if rank.main:
                log.figure("low_shot", low_shot_curve(results, shots))
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


def _labels(recipe: Svm | LowShot, evaluation: Evaluation) -> tuple[Labels, Labels]:
    """The labels of training and test data, which must have the same classes."""
    train, val = evaluation.train, evaluation.val
    if len(train.labels) > MAX_SAMPLES:
        raise ValueError(
            f"{len(train.labels)} training samples are more than {MAX_SAMPLES}: choose some of "
            "them with --train.limit"
        )
    if recipe.train_labels or recipe.val_labels:
        classes = int(max(train.labels.max(), val.labels.max())) + 1
    else:
        classes = classes_of(evaluation)
    labels = labels_of(recipe.train_labels, train, classes, recipe.train.root)
    test_labels = labels_of(recipe.val_labels, val, classes, recipe.val.root)
    if labels.shape[1] != test_labels.shape[1]:
        raise ValueError(
            f"training data have {labels.shape[1]} classes, test data {test_labels.shape[1]}"
        )
    return labels, test_labels


def _class_names(recipe: Svm | LowShot, evaluation: Evaluation, classes: int) -> tuple[str, ...]:
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
    given = (recipe.class_names, evaluation.train.classes, evaluation.val.classes)
    return next((names for names in given if len(names) == classes and names != numbers), numbers)


def _work(
    evaluation: Evaluation, stages: Sequence[str], units: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, list[int], torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Yield this rank's work: a stage, the numbers that go with it, its kernels and rows."""
    mine = units[share(len(units), evaluation.rank)]
    device = evaluation.rank.device
    for stage, group in itertools.groupby(mine, key=lambda unit: unit[0]):
        train, val = (part.stages[stages[stage]] for part in (evaluation.train, evaluation.val))
        kernel, test = gram(train, train, device), gram(val, train, device)
        yield stage, [number for _, number in group], kernel, test, compact(train, device)


def per_class(aps: Mapping[str, npt.NDArray[np.float64]], names: Sequence[str]) -> Figure:
    """Bars of the average precision (0 to 1, shown in percent) of every class, a row per stage.

    Args:
        aps: by stage, (C,).
        names: of the C classes.
    """
    fig = Figure(figsize=(7.5, 1.7 * len(aps) + 0.9), dpi=120, layout="constrained")
    axes = fig.subplots(len(aps), 1, squeeze=False, sharex=True)
    for ax, (stage, ap) in zip(axes.flat, aps.items(), strict=True):
        ax.bar(range(len(ap)), 100 * ap, color=figures.ACCENT)
        ax.set_title(
            f"{stage}: mAP {100 * ap.mean():.2f} %", fontsize=10, loc="left", color=figures.INK
        )
        ax.set_ylim(0, 100)
        ax.set_ylabel("AP (%)", fontsize=8)
        _plain_axes(ax)
    # Once, below all rows: the columns stand under one another.
    ax.set_xticks(range(len(names)), names, rotation=50, ha="right", rotation_mode="anchor")
    ax.set_xlabel("class", fontsize=9)
    return fig


def low_shot_curve(results: Mapping[str, Sequence[ShotResult]], shots: Sequence[int]) -> Figure:
    """The mAP over the number of positives per class; bars are one standard deviation."""
    fig = Figure(figsize=(5.6, 3.8), dpi=120, layout="constrained")
    ax = fig.subplots()
    for stage, rows in results.items():
        means, deviations = (
            [100 * getattr(r, name) for r in rows] for name in ("mean", "deviation")
        )
        ax.errorbar(shots, means, deviations, label=stage, marker="o", ms=3, lw=1.5, capsize=2)
    ax.set_xscale("log", base=2)
    ax.set_xticks(shots, [str(k) for k in shots])
    ax.set_xlabel("positives per class", fontsize=9)
    ax.set_ylabel("mAP (%)", fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    _plain_axes(ax)
    return fig


def _plain_axes(ax: Axes) -> None:
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25, lw=0.6, axis="y")
    ax.spines[["top", "right"]].set_visible(False)
