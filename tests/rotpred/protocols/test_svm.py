"""The SVM of the VOC07 protocols, against scikit-learn's LinearSVC run class after class."""

from __future__ import annotations

import json
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from pipelines.datasets.voc_classification import VOC_CLASSES
from pipelines.spec import CenterCrop, LoaderSpec
from rotpred.distributed import Rank
from rotpred.metrics.average_precision import average_precision
from rotpred.plots import svm as svm_plots
from rotpred.protocols import svm
from rotpred.recipes.base import CachedFeatureRun
from rotpred.recipes.svm import LowShot, Svm, voc07_lowshot, voc07_svm
from rotpred.records.tensorboard import pixels
from rotpred.svm import dual
from rotpred.svm.dual import COSTS, gram, normalize_rows, solve
from rotpred.svm.low_shot import aggregate, draw_samples, scores_of_draw
from rotpred.svm.primal import compact, solve_compact

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")
FEW = (1.0, 10.0, 0.5**4, 0.5**9, 0.5**19)
"""Costs that liblinear solves to the last digits in a moment."""

T = TypeVar("T", Svm, LowShot)
Labels = npt.NDArray[np.int8]
Rows = npt.NDArray[np.float32]


def data(n: int, dim: int, classes: int, seed: int) -> tuple[Rows, Labels]:
    """Positive features that say something about the classes; some labels are difficult."""
    shared = np.random.default_rng(99).standard_normal((classes, dim))
    own = np.random.default_rng(seed)
    present = own.random((n, classes)) < np.linspace(0.1, 0.4, classes)
    rows = np.maximum(0, 0.4 * present @ shared + own.standard_normal((n, dim)))
    labels = np.where(present, 1, np.where(own.random((n, classes)) < 0.06, 0, -1))
    return rows.astype(np.float32), labels.astype(np.int8)


def svc(cost: float) -> LinearSVC:
    """As published, but solved to the end, where the published settings stop before."""
    weight = {1: 2, -1: 1}
    return LinearSVC(
        C=cost, class_weight=weight, dual=True, tol=1e-8, max_iter=100_000, random_state=0
    )


def unit(rows: Rows) -> npt.NDArray[np.float64]:
    wide = rows.astype(np.float64)
    return wide / (np.sqrt((wide**2).sum(1)) + 1e-5)[:, None]


def straight_ap(scores: npt.NDArray[np.float64], truth: npt.NDArray[np.bool_]) -> float:
    """Area under the precision envelope, from its definition: for each recall, the best beyond."""
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


@pytest.mark.parametrize(("n", "dim"), [(60, 300), (150, 20)])
def test_the_exact_optimum_of_liblinear(n: int, dim: int) -> None:
    """Decision values of unseen rows, for few and for many samples per feature."""
    rows, labels = data(n, dim, 2, seed=1)
    others, _ = data(40, dim, 2, seed=2)
    signs = np.where(labels > 0, 1.0, -1.0).T
    kernel = gram(rows, rows, CPU)
    y = torch.from_numpy(signs)
    beta = solve(
        kernel.expand(2, -1, -1),
        y,
        torch.where(y > 0, 2.0, 1.0).double(),
        torch.tensor(FEW, dtype=torch.float64),
    )
    for c in range(2):
        decisions = (gram(others, rows, CPU) @ beta[c]).numpy()
        for j, cost in enumerate(FEW):
            model = svc(cost).fit(unit(rows), signs[c])
            expected = model.decision_function(unit(others))
            np.testing.assert_allclose(decisions[:, j], expected, rtol=1e-5, atol=1e-6)


def test_every_published_cost_is_optimal() -> None:
    """The gradient of the objective, written out in the weights, is zero at all nineteen costs."""
    rows, labels = data(120, 400, 1, seed=3)
    y = torch.from_numpy(np.where(labels > 0, 1.0, -1.0)).T
    weight = torch.where(y > 0, 2.0, 1.0).double()
    costs = torch.tensor(COSTS, dtype=torch.float64)
    beta = solve(gram(rows, rows, CPU)[None], y, weight, costs)[0]
    x = np.hstack([unit(rows), np.ones((len(rows), 1))])
    for cost, w in zip(COSTS, (x.T @ beta.numpy()).T, strict=True):
        slack = np.maximum(0, 1 - y[0].numpy() * (x @ w))
        gradient = w - 2 * cost * x.T @ (weight[0].numpy() * slack * y[0].numpy())
        assert np.linalg.norm(gradient) < 1e-6 * np.linalg.norm(w), cost


@pytest.mark.parametrize("dim", [1, 2, 4, 6])
def test_more_rows_than_features(dim: int) -> None:
    """A kernel of small rank: beta is long, and most of it changes no decision value."""
    costs = torch.tensor(COSTS, dtype=torch.float64)
    for seed, n in ((0, 60), (1, 200), (10, 500)):
        chance = np.random.default_rng([dim, seed, n])
        rows = chance.normal(size=(n, dim)).astype(np.float32)
        signs = np.where(chance.random(n) < 0.2, 1.0, -1.0)
        y = torch.from_numpy(signs)[None]
        weight = torch.where(y > 0, 2.0, 1.0).double()
        beta = solve(gram(rows, rows, CPU)[None], y, weight, costs)[0].numpy()
        x = np.hstack([unit(rows), np.ones((n, 1))])
        for cost, w in zip(COSTS, (x.T @ beta).T, strict=True):
            # Newton's method in the few weights themselves, from the solution on: it stays there.
            for _ in range(5):
                active = signs * (x @ w) < 1
                pull = 2 * cost * weight[0].numpy() * active
                hessian = np.eye(dim + 1) + (x.T * pull) @ x
                exact = np.linalg.solve(hessian, x.T @ (pull * signs))
                np.testing.assert_allclose(w, exact, atol=1e-6 * np.linalg.norm(exact))
                w = exact


@pytest.mark.parametrize("dim", [1, 6, 90])
def test_fewer_values_than_rows(dim: int) -> None:
    """Solved in the weights: they are optimal at all costs, and so are the decisions of beta."""
    rows, labels = data(400, dim, 1, seed=7)
    compacted = compact(rows, CPU)
    assert compacted is not None and compacted.shape == (400, dim + 1)
    assert compact(rows[: dim + 1], CPU) is None
    signs = np.where(labels[:, 0] > 0, 1.0, -1.0)
    y = torch.from_numpy(signs)
    weight = torch.where(y > 0, 2.0, 1.0).double()
    beta = solve_compact(compacted, y, weight, torch.tensor(COSTS, dtype=torch.float64)).numpy()
    x = np.hstack([unit(rows), np.ones((len(rows), 1))])
    for cost, w in zip(COSTS, (x.T @ beta).T, strict=True):
        pull = 2 * cost * weight.numpy() * (signs * (x @ w) < 1)
        hessian = np.eye(dim + 1) + (x.T * pull) @ x
        exact = np.linalg.solve(hessian, x.T @ (pull * signs))
        np.testing.assert_allclose(w, exact, atol=1e-6 * np.linalg.norm(exact))


def test_a_solved_problem_beside_others_stays_finite() -> None:
    """What is left of its gradient is rounding, which may say that the curvature is negative."""
    kernel = torch.tensor([[[2.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    gradient = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    rounded = torch.tensor([[[-3e-17], [-4e-17]]], dtype=torch.float64)
    curvature = torch.tensor([[[200.0], [0.0]]], dtype=torch.float64)
    step, _ = dual._conjugate_gradients(
        kernel, curvature, gradient, rounded, torch.zeros(1, 1, 1, dtype=torch.bool),
        torch.zeros(1, 1, 1, dtype=torch.float64),
    )  # fmt: skip
    assert step.tolist() == [[[0.0], [0.0]]]
    with pytest.raises(RuntimeError, match="not finite"):
        one = torch.ones(1, 2, dtype=torch.float64)
        solve(kernel * torch.nan, one, one, torch.ones(1, dtype=torch.float64))


def test_blocks_of_the_kernel_fit_together() -> None:
    """More rows and columns than a block has; the norm as published, float64."""
    rows, _ = data(1100, 5, 1, seed=4)
    others, _ = data(600, 5, 1, seed=5)
    expected = unit(others) @ unit(rows).T + 1
    np.testing.assert_allclose(gram(others, rows, CPU).numpy(), expected, rtol=0, atol=1e-14)
    assert normalize_rows(np.zeros((1, 3), np.float32)).tolist() == [[0.0, 0.0, 0.0]]


def test_average_precision() -> None:
    """Both definitions on a case that is done by hand: hits at places 1, 3 and 6."""
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    truth = np.array([True, False, True, False, False, True])
    published, eleven = average_precision(scores, truth)
    assert published == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    # Recall 0 to 0.3: 1; 0.4 to 0.6: 2/3; from 0.7 on: 1/2.
    assert eleven == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 1 / 2) / 11)
    generator = np.random.default_rng(0)
    for _ in range(20):
        scores, truth = generator.standard_normal(50), generator.random(50) < 0.3
        assert average_precision(scores, truth)[0] == pytest.approx(straight_ap(scores, truth))
    # Ten positives: recalls are the tenths themselves, which floating point misses.
    perfect = np.arange(20.0)
    assert average_precision(perfect, perfect >= 10) == (1.0, 1.0)
    with pytest.raises(ValueError, match="positive sample"):
        average_precision(scores, np.zeros(50, bool))
    with pytest.raises(ValueError, match="not finite"):
        average_precision(np.array([np.nan, 1]), np.array([True, False]))


def test_the_full_protocol_class_after_class() -> None:
    """mAP to 1e-6: folds, chosen cost, refit and test as scikit-learn and straight code do it."""
    rows, labels = data(120, 64, 3, seed=6)
    others, truth = data(80, 64, 3, seed=7)
    recipe = Svm(costs=FEW)
    kernel, test = gram(rows, rows, CPU), gram(others, rows, CPU)
    assert (labels == 0).any() and (truth == 0).any()
    ours, theirs = [], []
    for c in range(3):
        ap, _, cost = svm.one_class(kernel, test, labels[:, c], truth[:, c], recipe)
        ours.append(ap)
        # Difficult samples are negatives in training ...
        y = np.where(labels[:, c] == 1, 1, -1)
        means = []
        for candidate in FEW:
            aps = []
            for fit, held in StratifiedKFold(3).split(rows, y):
                model = svc(candidate).fit(unit(rows)[fit], y[fit])
                scores = model.decision_function(unit(rows)[held])
                aps.append(average_precision_score(y[held] == 1, scores))
            means.append(np.mean(aps))
        assert cost == FEW[int(np.argmax(means))]
        scores = svc(cost).fit(unit(rows), y).decision_function(unit(others))
        keep = truth[:, c] != 0  # ... and no samples in the test
        theirs.append(straight_ap(scores[keep], truth[keep, c] == 1))
    assert 0.2 < np.mean(theirs) < 0.95
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=1e-6)


def test_low_shot_class_after_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the low-shot protocol, with classes solved together and in parts."""
    rows, labels = data(200, 64, 3, seed=8)
    others, truth = data(80, 64, 3, seed=9)
    kernel, test = gram(rows, rows, CPU), gram(others, rows, CPU)
    done: list[None] = []

    def scores() -> npt.NDArray[np.float64]:
        return scores_of_draw(
            kernel, test, labels, truth, shots=(1, 6), costs=FEW, positive_weight=2.0,
            seed=(5, 1), tick=lambda: done.append(None),
        )  # fmt: skip

    found = scores()
    assert found.shape == (2, 3, len(FEW)) and len(done) == 6
    monkeypatch.setattr("rotpred.svm.low_shot._CHUNK", 2 * 18**2)
    np.testing.assert_allclose(scores(), found, rtol=0, atol=1e-12)
    for place, k in enumerate((1, 6)):
        for c in range(3):
            chosen = draw_samples(labels[:, c], k, classes=3, seed=(5, 1, k, c))
            for j, cost in enumerate(FEW):
                model = svc(cost).fit(unit(rows)[chosen], labels[chosen, c])
                decisions = model.decision_function(unit(others))
                keep = truth[:, c] != 0
                expected = straight_ap(decisions[keep], truth[keep, c] == 1)
                assert found[place, c, j] == pytest.approx(expected, abs=1e-6)


def test_draws() -> None:
    """k positives first, 2k negatives of three classes, no difficult one, all different."""
    _, labels = data(300, 4, 3, seed=10)
    chosen = draw_samples(labels[:, 1], 8, classes=3, seed=(0, 0, 8, 1))
    assert (labels[chosen, 1] == np.repeat([1, -1], [8, 16])).all()
    assert len(set(chosen)) == 24
    assert (chosen == draw_samples(labels[:, 1], 8, classes=3, seed=(0, 0, 8, 1))).all()
    assert (chosen != draw_samples(labels[:, 1], 8, classes=3, seed=(0, 1, 8, 1))).any()
    with pytest.raises(ValueError, match="500 shots need 500 positive samples"):
        draw_samples(labels[:, 1], 500, classes=3, seed=(0,))


def test_one_cost_for_all_draws_is_chosen_on_their_mean() -> None:
    """Two draws, one k, two classes, two costs: the second cost has the higher mean."""
    scores = np.array([[[[0.9, 0.5], [0.1, 0.7]]], [[[0.4, 0.8], [0.2, 0.8]]]])
    (result,) = aggregate(scores, (1.0, 10.0))
    assert result.cost == 10.0
    assert (result.mean, result.lowest, result.highest) == pytest.approx((0.7, 0.6, 0.8))
    assert result.deviation == pytest.approx(0.1)


def spec(samples: int, seed: int) -> LoaderSpec:
    return LoaderSpec(
        data="synthetic", samples=samples, seed=seed, batch_size=16, views="plain",
        crop=CenterCrop(32, None), flip=False, shuffle=False, drop_last=False,
    )  # fmt: skip


def test_run_folders(tmp_path: Path) -> None:
    """From images to rows and figures; a finished folder is left as it is."""
    place = CachedFeatureRun(
        out=str(tmp_path / "full"), cache=str(tmp_path / "cache"), device="cpu"
    )
    table = np.where(np.arange(24)[:, None] % 3 == np.arange(3), 1, -1).astype(np.int8)
    np.save(tmp_path / "labels.npy", table)
    common = {
        "weights": "random", "backbone": "resnet18_tiny", "train": spec(24, 0),
        "val": spec(24, 1), "train_labels": str(tmp_path / "labels.npy"),
        "val_labels": str(tmp_path / "labels.npy"), "stages": ("res5", "avgpool"), "costs": FEW,
    }  # fmt: skip
    full = Svm(run=place, class_names=("ox", "ass", "goose"), **common)  # type: ignore[arg-type]
    out = svm.run(full, Rank())
    rows = {row["metric"]: row for row in json.loads((out / "results.json").read_text())}
    assert set(rows) == {f"{m}/{s}" for m in ("mAP", "mAP11") for s in ("res5", "avgpool")}
    row = rows["mAP/res5"]
    assert row["value"] == pytest.approx(100 * np.mean(row["per_class"])) and row["n"] == 24
    assert row["classes"] == ["ox", "ass", "goose"] and len(row["per_class"]) == 3
    assert (out / "figures" / "per_class.png").exists() and (out / "done.json").exists()
    written = (out / "results.json").stat().st_mtime_ns
    svm.run(full, Rank())
    assert (out / "results.json").stat().st_mtime_ns == written

    few = LowShot(
        shots=(1, 4),
        draws=2,
        run=CachedFeatureRun(str(tmp_path / "few"), "cpu", cache=place.cache),
        **common,
    )  # type: ignore[arg-type]
    out = svm.run_low_shot(few, Rank())
    rows = {row["metric"]: row for row in json.loads((out / "results.json").read_text())}
    assert set(rows) == {f"mAP/{s}/k={k}" for s in ("res5", "avgpool") for k in (1, 4)}
    row = rows["mAP/avgpool/k=4"]
    assert row["lowest"] <= row["value"] <= row["highest"] and row["cost"] in FEW
    assert (out / "figures" / "low_shot.png").exists()


def tables(made: T, folder: Path, **changes: Any) -> T:
    """A recipe whose labels, of 24 samples, are in labels.npy of the folder."""
    return replace(
        made, weights="random", backbone="resnet18_tiny", train=spec(24, 0), val=spec(24, 1),
        train_labels=str(folder / "labels.npy"), val_labels=str(folder / "labels.npy"),
        stages=("avgpool",),
        run=CachedFeatureRun(str(folder / "run"), "cpu", cache=str(folder / "cache")),
        **changes,
    )  # fmt: skip


def test_labels_of_another_data_set_are_refused(tmp_path: Path) -> None:
    """Fewer rows, and more: VOC07's trainval has more images than its test split."""
    for rows in (5, 27):
        np.save(tmp_path / "labels.npy", np.ones((rows, 3), np.int8))
        recipe = tables(Svm(), tmp_path)
        with pytest.raises(ValueError, match=f"has {rows} rows, but the data have 24 samples"):
            svm.run(recipe, Rank())
    assert not (tmp_path / "cache").exists()  # before the work on images


@pytest.mark.parametrize(
    ("made", "change", "words"),
    [
        (Svm(), (slice(0, 22), 1, -1), "class ass has 1 positive samples in the training data"),
        (Svm(), (slice(0, 24), 2, 0), "class goose has 0 positive samples in the training data"),
        (LowShot(), (slice(0, 24), 0, 1), "class ox has 0 negative samples in the training data"),
    ],
)
def test_a_class_with_too_few_samples_is_named(
    made: Svm | LowShot, change: tuple[slice, int, int], words: str, tmp_path: Path
) -> None:
    table = np.where(np.arange(24)[:, None] % 3 == np.arange(3), 1, -1).astype(np.int8)
    rows, column, value = change
    table[rows, column] = value
    np.save(tmp_path / "labels.npy", table)
    made = tables(made, tmp_path, class_names=("ox", "ass", "goose"))
    if isinstance(made, LowShot):
        made = replace(made, shots=(2, 1))
    with pytest.raises(ValueError, match=words):
        svm.run(made, Rank()) if isinstance(made, Svm) else svm.run_low_shot(made, Rank())


def test_test_data_without_a_class_are_refused(tmp_path: Path) -> None:
    table = np.where(np.arange(24)[:, None] % 3 == np.arange(3), 1, -1).astype(np.int8)
    np.save(tmp_path / "labels.npy", table)
    table[:, 2] = -1
    np.save(tmp_path / "test.npy", table)
    made = replace(tables(Svm(), tmp_path), val_labels=str(tmp_path / "test.npy"))
    with pytest.raises(ValueError, match="class 2 has 0 positive samples in the test data"):
        svm.run(made, Rank())


@pytest.mark.parametrize("kind", [Svm, LowShot])
def test_names_must_be_as_many_as_the_classes(
    kind: type[Svm] | type[LowShot], tmp_path: Path
) -> None:
    np.save(tmp_path / "labels.npy", np.ones((24, 3), np.int8))
    common = {"train_labels": str(tmp_path / "labels.npy"), "stages": ("avgpool",)}
    recipe = kind(
        weights="random", backbone="resnet18_tiny", train=spec(24, 0), val=spec(24, 1),
        val_labels=common["train_labels"], class_names=VOC_CLASSES, **common,
        run=CachedFeatureRun(str(tmp_path / "run"), "cpu", cache=str(tmp_path / "cache")),
    )  # type: ignore[arg-type]  # fmt: skip
    execute = svm.run if kind is Svm else svm.run_low_shot
    with pytest.raises(ValueError, match="20 class_names for labels of 3 classes: --class-names"):
        execute(recipe, Rank())  # type: ignore[operator]


def test_names_of_the_columns() -> None:
    """The recipe's first, then the data's where they fit, then numbers."""

    def names(given: tuple[str, ...], train: tuple[str, ...], val: tuple[str, ...]) -> str:
        parts: Any = tuple(types.SimpleNamespace(classes=part) for part in (train, val))
        return " ".join(svm._class_names(Svm(class_names=given), parts, 2))

    assert names(("ox", "ass"), ("a", "b"), ()) == "ox ass"
    assert names((), ("a", "b"), ("0", "1")) == names((), ("0", "1"), ("a", "b")) == "a b"
    assert names((), (), ()) == names((), ("0", "1"), ("0", "1")) == "0 1"
    assert names((), ("all",), ("all",)) == "0 1"  # images of one folder, and a table of labels


def test_the_figure_names_every_class() -> None:
    """Twenty names below the bars, none on its neighbour."""
    aps = {stage: np.linspace(0.1, 0.9, 20) for stage in ("res4", "res5")}
    fig = svm_plots.per_class(aps, VOC_CLASSES)
    pixels(fig)
    first, last = fig.axes
    labels = last.get_xticklabels()
    assert [label.get_text() for label in labels] == list(VOC_CLASSES)
    assert not any(label.get_visible() for label in first.get_xticklabels())
    height = labels[0].get_fontsize() * fig.dpi / 72
    ends = [label.get_window_extent().x1 for label in labels]
    # Slanted lines of text: what lies between them is the step times the sine of the slant.
    assert min(np.diff(ends)) * np.sin(np.radians(labels[0].get_rotation())) > height


def test_the_published_settings() -> None:
    """protocols: nineteen costs from 100 to 0.5^19, three folds, positives twice."""
    recipe = voc07_svm()
    assert len(recipe.costs) == 19 and recipe.costs[:3] == (1.0, 10.0, 100.0)
    assert (recipe.costs[3], recipe.costs[-1]) == (0.0625, pytest.approx(1.9e-6, rel=0.01))
    assert (recipe.folds, recipe.positive_weight, recipe.train.crop.size) == (3, 2.0, 224)
    assert recipe.class_names == voc07_lowshot().class_names == VOC_CLASSES
    assert voc07_lowshot().shots == (1, 2, 4, 8, 16, 32, 64, 96) and voc07_lowshot().draws == 5
