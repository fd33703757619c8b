"""The low-shot SVM protocol on one stage's features: ours compared with scikit-learn.

    python benchmarks/low_shot.py --output low_shot.jsonl

Generates features of VOC07's size: as many images, classes and positives, 9,216 values each. Both
sides get the same draws and costs, train to the end, and score the whole test data. Our solver is
exact; scikit-learn's LinearSVC (liblinear), one class after another with the published settings,
stops at its tolerance or after 2,000 passes. Each side runs in its own process, whose CPU seconds
and peak memory are reported. With the defaults scikit-learn takes most of an hour on one core;
--peer-draws 0 skips it.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from harness.results import RepeatOptions, Row, against, publish, row, run_program
from rotpred.metrics.average_precision import average_precision
from rotpred.recipes.svm import COSTS
from rotpred.svm.dual import gram, normalize_rows
from rotpred.svm.low_shot import draw_samples, scores_of_draw
from rotpred.svm.primal import Kernels

WEIGHT = 2.0
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
LARGEST_SHARE = 0.5
COLUMNS = ("cpu_seconds", "peak_mib", "mean_ap", "target", "met")
Side = Literal["ours", "scikit-learn"]
LabelledFeatures = tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]
"""Features float32 (N, D) and labels int8 (N, classes): 1, -1, or 0 for difficult ones."""


@dataclass(frozen=True)
class Arguments(RepeatOptions):
    """Time and memory of the low-shot protocol on one stage."""

    repeats: int = 1
    """Runs of each side; the order alternates."""
    samples: int = 5011
    """Training images (VOC07 trainval)."""
    tests: int = 4952
    """Test images (VOC07 test)."""
    values: int = 9216
    """Features per image."""
    classes: int = 20
    """Classes, one against the rest."""
    shots: tuple[int, ...] = SHOTS
    """Positives per class; the negatives are (classes - 1) times as many."""
    draws: int = 1
    """Draws to time ours on; the protocol has five."""
    peer_draws: int = 1
    """Draws to time scikit-learn on, the first of ours; 0 skips it."""
    threads: int = 1
    """Threads of our solver; scikit-learn's has one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peer_draws > self.draws or self.draws < 1:
            raise ValueError("--draws must be at least 1, and --peer-draws at most --draws")


def main(args: Arguments) -> None:
    """Measure and publish. User errors raise `ValueError`."""
    sides: list[tuple[Side, int]] = [("ours", args.draws)]
    if args.peer_draws:
        sides.append(("scikit-learn", args.peer_draws))
    results: dict[Side, list[dict[str, Any]]] = {side: [] for side, _ in sides}
    for repeat in range(args.repeats):
        for side, draws in sides if repeat % 2 == 0 else sides[::-1]:
            results[side].append(_measure_in_process(side, args, draws))
    device = torch.device("cpu")
    size = f"{args.samples:,} x {args.values:,}, {args.tests:,} tests, {args.classes} classes"
    rows: list[Row] = []
    for side, draws in sides:
        facts = results[side]
        more = {name: facts[0][name] for name in facts[0] if name not in ("cpu_seconds", "seconds")}
        rows.append(
            row(
                "low_shot",
                side,
                f"{size}, draws: {draws}",
                [fact["seconds"] for fact in facts],
                unit="s",
                device=device,
                order="in turns" if args.repeats > 1 else "",
                threads=args.threads if side == "ours" else 1,
                cpu_seconds=round(min(fact["cpu_seconds"] for fact in facts), 1),
                **more,
            )
        )
    if args.peer_draws:
        # CPU seconds per draw: neither threads nor neighbours favour either side.
        pairs = zip(results["ours"], results["scikit-learn"], strict=True)
        shares = [
            (a["cpu_seconds"] / args.draws) / (b["cpu_seconds"] / args.peer_draws) for a, b in pairs
        ]
        rows.append(
            row(
                "low_shot", "ours / scikit-learn, CPU seconds per draw", size, shares, unit="x",
                device=device, digits=3, order="", **against(max(shares), LARGEST_SHARE, "lower"),
            )
        )  # fmt: skip
    publish(rows, args.output, COLUMNS)


def _measure_in_process(side: Side, args: Arguments, draws: int) -> dict[str, Any]:
    """Measure one side in a new process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (side, args, draws))


def _measure(side: Side, args: Arguments, draws: int) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    train, test = _make_features(args, args.samples, 0), _make_features(args, args.tests, 1)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall, cpu = time.perf_counter(), time.process_time()
    work = _ours if side == "ours" else _peer
    mean, unfinished = work(train, test, args, draws)
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "features_mib": round(base),
        "mean_ap": round(100 * mean, 3),
        "not_converged": unfinished,
    }


def _ours(
    train: LabelledFeatures, test: LabelledFeatures, args: Arguments, draws: int
) -> tuple[float, int]:
    cpu = torch.device("cpu")
    kernels = Kernels(gram(train[0], train[0], cpu), gram(test[0], train[0], cpu))
    scores = [
        scores_of_draw(
            kernels, train[1], test[1], shots=args.shots, costs=COSTS,
            positive_weight=WEIGHT, seed=(0, number), tick=lambda: None,
        )
        for number in range(draws)
    ]  # fmt: skip
    return float(np.mean(scores)), 0


def _peer(
    train: LabelledFeatures, test: LabelledFeatures, args: Arguments, draws: int
) -> tuple[float, int]:
    """Run scikit-learn with the settings of mmselfsup, svm_voc07/tools/train_svm_low_shot.py."""
    (features, labels), (held_features, held_labels) = train, test
    rows, held = normalize_rows(features).numpy(), normalize_rows(held_features).numpy()
    scores, unfinished = [], 0
    for number in range(draws):
        for k in args.shots:
            signs = np.concatenate([np.ones(k), -np.ones((args.classes - 1) * k)])
            for c in range(args.classes):
                chosen = draw_samples(labels[:, c], k, classes=args.classes, seed=(0, number, k, c))
                keep = held_labels[:, c] != 0
                for cost in COSTS:
                    svm = LinearSVC(
                        C=cost, class_weight={1: WEIGHT, -1: 1}, intercept_scaling=1.0,
                        penalty="l2", loss="squared_hinge", tol=1e-4, dual=True, max_iter=2000,
                    )  # fmt: skip
                    with warnings.catch_warnings(record=True) as caught:
                        warnings.simplefilter("always", ConvergenceWarning)
                        svm.fit(rows[chosen], signs)
                    unfinished += len(caught)
                    decisions = svm.decision_function(held)[keep]
                    scores.append(average_precision(decisions, held_labels[keep, c] > 0)[0])
    return float(np.mean(scores)), unfinished


def _make_features(args: Arguments, count: int, part: int) -> LabelledFeatures:
    """Return rectified noise around the sum of each image's class directions, and the labels.

    A class has 3.5 % to 12 % of the images, and a few labels are difficult, as in VOC07.
    """
    shared = np.random.default_rng(0)
    directions = shared.normal(size=(args.classes, args.values)).astype(np.float32)
    shares = np.linspace(0.035, 0.12, args.classes)
    generator = np.random.default_rng(1 + part)
    labels = np.where(generator.random((count, args.classes)) < shares, 1, -1).astype(np.int8)
    features = generator.normal(size=(count, args.values)).astype(np.float32)
    features += 0.15 * (labels > 0).astype(np.float32) @ directions
    labels[generator.random(labels.shape) < 0.01] = 0
    return np.maximum(features, 0), labels


if __name__ == "__main__":
    run_program(main, Arguments, "low_shot")
