"""The VOC07 protocols: one-vs-rest linear SVMs on frozen features, with all samples or low-shot."""

from __future__ import annotations

import itertools
from collections.abc import Callable
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
from rotpred.svm.dual import gram
from rotpred.svm.low_shot import aggregate, scores_of_draw
from rotpred.svm.primal import Kernels, compact

MAX_SAMPLES = 20_000
"""Largest number of training samples. Their kernel, 8 bytes a pair, takes 3.2 GB of memory."""


def run(recipe: Svm, rank: Rank) -> Path:
    """Choose each class's cost by cross-validation, test every stage, write the run folder.

    Returns:
        The run folder; results.json has the mAP of every stage.

    Raises:
        ValueError: The weights, data and recipe do not fit together.
    """
    with open_run(recipe, rank, open_extraction_loader) as run:
        parts, (labels, test_labels), class_names = _prepare(recipe, run)
        classes, n = labels.shape[1], len(test_labels)
        # Difficult samples are negatives in training.
        signs = np.where(labels > 0, np.int8(1), np.int8(-1))
        needed = recipe.folds
        check_counts(signs, class_names, "training data", positive=needed, negative=needed)
        check_counts(test_labels, class_names, "test data", positive=1, negative=0)
        if run.start(-(-len(recipe.stages) * classes // rank.world)):
            done = itertools.count(1)

            def evaluate(kernels: Kernels, c: int) -> tuple[float, float, float]:
                found = evaluate_class(kernels, labels[:, c], test_labels[:, c], recipe)
                run.log.tick(next(done))
                return found

            found = _every_stage(run, parts, classes, (3,), evaluate)
            for name, values in found.items():
                ap, eleven, cost = values.T.tolist()
                run.result(
                    f"mAP/{name}",
                    float(np.mean(ap)),
                    n=n,
                    classes=list(class_names),
                    per_class=ap,
                    costs=cost,
                )
                run.result(f"mAP11/{name}", float(np.mean(eleven)), n=n)
            if rank.main:
                aps = {name: values[:, 0] for name, values in found.items()}
                run.log.figure("per_class", svm.class_ap_figure(aps, class_names))
    return run.out


def evaluate_class(
    kernels: Kernels,
    labels: npt.NDArray[np.int8],
    test_labels: npt.NDArray[np.int8],
    recipe: Svm,
) -> tuple[float, float, float]:
    """Choose the cost of one class by cross-validation, train on all samples, test.

    Source: mmselfsup, tools/benchmarks/classification/svm_voc07/tools/{train_svm_kfold_parallel,
    test_svm}.py. Difficult samples (0) are negatives in training and are left out of the test.
    liblinear, used there, stops at its tolerance or after 2000 passes; this is the exact optimum.
    There must be at least as many positives and negatives as folds, and a positive in the test data
    (`multilabel.check_counts`).

    Args:
        kernels: Of N training and M test samples.
        labels: int8 (N,).
        test_labels: int8 (M,).
        recipe: Costs, folds, weight of positives.

    Returns:
        AP as published, 11-point AP, and the chosen cost.
    """
    # Imported here because it takes 1.5 seconds, which other jobs do not need.
    from sklearn.metrics import average_precision_score
    from sklearn.model_selection import StratifiedKFold

    kernel, weight = kernels.train, recipe.positive_weight
    signs = torch.where(torch.from_numpy(labels) > 0, 1.0, -1.0).to(kernel)
    costs = torch.tensor(recipe.costs, dtype=kernel.dtype, device=kernel.device)
    precision = np.zeros((recipe.folds, len(costs)))
    # As cross_val_score(cv=3): stratified, without shuffling.
    folds = StratifiedKFold(recipe.folds).split(np.zeros(len(labels)), labels > 0)
    for fold, (fit, held) in enumerate(folds):
        chosen = torch.from_numpy(fit).to(kernel.device)
        beta = kernels.fit(chosen[None], signs[None, chosen], costs, positive_weight=weight)[0]
        scores = kernel[held][:, fit] @ beta
        precision[fold] = [
            average_precision_score(labels[held] > 0, s.numpy()) for s in scores.T.cpu()
        ]
    best = int(precision.mean(axis=0).argmax())
    beta = kernels.fit(None, signs[None], costs[best : best + 1], positive_weight=weight)[0]
    keep = test_labels != 0
    scores = (kernels.test @ beta)[:, 0].cpu().numpy()[keep]
    return (*average_precision(scores, test_labels[keep] > 0), recipe.costs[best])


def run_low_shot(recipe: LowShot, rank: Rank) -> Path:
    """Train on few samples per class, over several draws, and test every stage.

    Returns:
        The run folder; results.json has mean and deviation of the mAP per stage and number of
        shots.

    Raises:
        ValueError: The weights, data and recipe do not fit together.
    """
    shots, draws = recipe.shots, recipe.draws
    with open_run(recipe, rank, open_extraction_loader) as run:
        parts, (labels, test_labels), class_names = _prepare(recipe, run)
        classes, most = labels.shape[1], max(shots)
        others = most * (classes - 1)
        check_counts(labels, class_names, "training data", positive=most, negative=others)
        check_counts(test_labels, class_names, "test data", positive=1, negative=0)
        if run.start(-(-len(recipe.stages) * draws * len(shots) * classes // rank.world)):
            done = itertools.count(1)

            def evaluate(kernels: Kernels, draw: int) -> npt.NDArray[np.float64]:
                return scores_of_draw(
                    kernels,
                    labels,
                    test_labels,
                    shots=shots,
                    costs=recipe.costs,
                    positive_weight=recipe.positive_weight,
                    seed=(recipe.seed, draw),
                    tick=lambda: run.log.tick(next(done)),
                )

            shape = (len(shots), classes, len(recipe.costs))
            scores = _every_stage(run, parts, draws, shape, evaluate)
            results = {name: aggregate(part, recipe.costs) for name, part in scores.items()}
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
                        draws=draws,
                    )
            if rank.main:
                run.log.figure("low_shot", svm.low_shot_curve(results, shots))
    return run.out


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


def _every_stage(
    run: Run[Loader],
    parts: tuple[Features, Features],
    count: int,
    shape: tuple[int, ...],
    evaluate: Callable[[Kernels, int], npt.ArrayLike],
) -> dict[str, npt.NDArray[np.float64]]:
    """Evaluate `count` classes or draws of every stage, shared between the ranks.

    Args:
        run: Its recipe names the stages.
        parts: Features of training and test data.
        count: Number of classes or draws.
        shape: Shape of the values of one of them.
        evaluate: Returns these values for one stage and number.

    Returns:
        float64 (count, *shape) by stage, the same on all ranks.
    """
    stages = tuple(parts[0].stages)
    units = list(itertools.product(range(len(stages)), range(count)))
    found = torch.zeros(len(stages), count, *shape, dtype=torch.float64)
    mine, device = units[run.rank.part_of(len(units))], run.rank.device
    for stage, group in itertools.groupby(mine, key=lambda unit: unit[0]):
        train, test = (part.stages[stages[stage]] for part in parts)
        kernels = Kernels(
            gram(train, train, device), gram(test, train, device), compact(train, device)
        )
        for _, number in group:
            values = torch.as_tensor(evaluate(kernels, number), dtype=torch.float64)
            found[stage, number] = values
    found = all_sum(found, run.rank)
    return dict(zip(stages, found.numpy(), strict=True))
