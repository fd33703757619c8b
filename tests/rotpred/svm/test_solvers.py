"""The SVM solvers and protocols, against scikit-learn's LinearSVC, class by class."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from rotpred.protocols import svm
from rotpred.recipes.svm import COSTS, Svm
from rotpred.svm import dual
from rotpred.svm.dual import gram, normalize_rows, solve
from rotpred.svm.low_shot import aggregate, draw_samples, scores_of_draw
from rotpred.svm.primal import Kernels, compact, solve_compact
from tests.support.references import EXACT_COSTS, exact_svc, reference_ap, unit_rows

pytestmark = pytest.mark.timeout(120)


CPU = torch.device("cpu")


Labels = npt.NDArray[np.int8]


Rows = npt.NDArray[np.float32]


def data(n: int, dim: int, classes: int, seed: int) -> tuple[Rows, Labels]:
    """Positive features that correlate with the classes; some labels are difficult."""
    shared = np.random.default_rng(99).standard_normal((classes, dim))
    own = np.random.default_rng(seed)
    present = own.random((n, classes)) < np.linspace(0.1, 0.4, classes)
    rows = np.maximum(0, 0.4 * present @ shared + own.standard_normal((n, dim)))
    labels = np.where(present, 1, np.where(own.random((n, classes)) < 0.06, 0, -1))
    return rows.astype(np.float32), labels.astype(np.int8)


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
        torch.tensor(EXACT_COSTS, dtype=torch.float64),
    )
    for c in range(2):
        decisions = (gram(others, rows, CPU) @ beta[c]).numpy()
        for j, cost in enumerate(EXACT_COSTS):
            model = exact_svc(cost).fit(unit_rows(rows), signs[c])
            expected = model.decision_function(unit_rows(others))
            np.testing.assert_allclose(decisions[:, j], expected, rtol=1e-5, atol=1e-6)


def test_every_published_cost_is_optimal() -> None:
    """The gradient of the primal objective is zero at all nineteen costs."""
    rows, labels = data(120, 400, 1, seed=3)
    y = torch.from_numpy(np.where(labels > 0, 1.0, -1.0)).T
    weight = torch.where(y > 0, 2.0, 1.0).double()
    costs = torch.tensor(COSTS, dtype=torch.float64)
    beta = solve(gram(rows, rows, CPU)[None], y, weight, costs)[0]
    x = np.hstack([unit_rows(rows), np.ones((len(rows), 1))])
    for cost, w in zip(COSTS, (x.T @ beta.numpy()).T, strict=True):
        slack = np.maximum(0, 1 - y[0].numpy() * (x @ w))
        gradient = w - 2 * cost * x.T @ (weight[0].numpy() * slack * y[0].numpy())
        assert np.linalg.norm(gradient) < 1e-6 * np.linalg.norm(w), cost


@pytest.mark.parametrize("dim", [1, 2, 4, 6])
def test_more_rows_than_features(dim: int) -> None:
    """A kernel of low rank: most directions of beta change no decision value."""
    costs = torch.tensor(COSTS, dtype=torch.float64)
    for seed, n in ((0, 60), (1, 200), (10, 500)):
        chance = np.random.default_rng([dim, seed, n])
        rows = chance.normal(size=(n, dim)).astype(np.float32)
        signs = np.where(chance.random(n) < 0.2, 1.0, -1.0)
        y = torch.from_numpy(signs)[None]
        weight = torch.where(y > 0, 2.0, 1.0).double()
        beta = solve(gram(rows, rows, CPU)[None], y, weight, costs)[0].numpy()
        x = np.hstack([unit_rows(rows), np.ones((n, 1))])
        for cost, w in zip(COSTS, (x.T @ beta).T, strict=True):
            # Newton's method in the primal weights, started at the solution, stays there.
            for _ in range(5):
                active = signs * (x @ w) < 1
                pull = 2 * cost * weight[0].numpy() * active
                hessian = np.eye(dim + 1) + (x.T * pull) @ x
                exact = np.linalg.solve(hessian, x.T @ (pull * signs))
                np.testing.assert_allclose(w, exact, atol=1e-6 * np.linalg.norm(exact))
                w = exact


@pytest.mark.parametrize("dim", [1, 6, 90])
def test_fewer_values_than_rows(dim: int) -> None:
    """Solved in the primal: weights are optimal at all costs, and so are the decisions of beta."""
    rows, labels = data(400, dim, 1, seed=7)
    compacted = compact(rows, CPU)
    assert compacted is not None and compacted.shape == (400, dim + 1)
    assert compact(rows[: dim + 1], CPU) is None
    signs = np.where(labels[:, 0] > 0, 1.0, -1.0)
    y = torch.from_numpy(signs)
    weight = torch.where(y > 0, 2.0, 1.0).double()
    beta = solve_compact(compacted, y, weight, torch.tensor(COSTS, dtype=torch.float64)).numpy()
    x = np.hstack([unit_rows(rows), np.ones((len(rows), 1))])
    for cost, w in zip(COSTS, (x.T @ beta).T, strict=True):
        pull = 2 * cost * weight.numpy() * (signs * (x @ w) < 1)
        hessian = np.eye(dim + 1) + (x.T * pull) @ x
        exact = np.linalg.solve(hessian, x.T @ (pull * signs))
        np.testing.assert_allclose(w, exact, atol=1e-6 * np.linalg.norm(exact))


def test_a_solved_problem_beside_others_stays_finite() -> None:
    """The rest of its gradient is rounding noise, which may suggest a negative curvature."""
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
    """More rows and columns than one block; the norm as published, in float64."""
    rows, _ = data(1100, 5, 1, seed=4)
    others, _ = data(600, 5, 1, seed=5)
    expected = unit_rows(others) @ unit_rows(rows).T + 1
    np.testing.assert_allclose(gram(others, rows, CPU).numpy(), expected, rtol=0, atol=1e-14)
    assert normalize_rows(np.zeros((1, 3), np.float32)).tolist() == [[0.0, 0.0, 0.0]]


def test_the_full_protocol_class_after_class() -> None:
    """mAP to 1e-6: folds, chosen cost, refit and test as in scikit-learn and plain code."""
    rows, labels = data(120, 64, 3, seed=6)
    others, truth = data(80, 64, 3, seed=7)
    recipe = Svm(costs=EXACT_COSTS)
    kernels = Kernels(gram(rows, rows, CPU), gram(others, rows, CPU))
    assert (labels == 0).any() and (truth == 0).any()
    ours, theirs = [], []
    for c in range(3):
        ap, _, cost = svm.evaluate_class(kernels, labels[:, c], truth[:, c], recipe)
        ours.append(ap)
        # Difficult samples are negatives in training ...
        y = np.where(labels[:, c] == 1, 1, -1)
        means = []
        for candidate in EXACT_COSTS:
            aps = []
            for fit, held in StratifiedKFold(3).split(rows, y):
                model = exact_svc(candidate).fit(unit_rows(rows)[fit], y[fit])
                scores = model.decision_function(unit_rows(rows)[held])
                aps.append(average_precision_score(y[held] == 1, scores))
            means.append(np.mean(aps))
        assert cost == EXACT_COSTS[int(np.argmax(means))]
        scores = exact_svc(cost).fit(unit_rows(rows), y).decision_function(unit_rows(others))
        keep = truth[:, c] != 0  # ... and no samples in the test
        theirs.append(reference_ap(scores[keep], truth[keep, c] == 1))
    assert 0.2 < np.mean(theirs) < 0.95
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=1e-6)


def test_low_shot_class_after_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the low-shot protocol, with classes solved together and in chunks."""
    rows, labels = data(200, 64, 3, seed=8)
    others, truth = data(80, 64, 3, seed=9)
    kernels = Kernels(gram(rows, rows, CPU), gram(others, rows, CPU))
    done: list[None] = []

    def scores() -> npt.NDArray[np.float64]:
        return scores_of_draw(
            kernels, labels, truth, shots=(1, 6), costs=EXACT_COSTS, positive_weight=2.0,
            seed=(5, 1), tick=lambda: done.append(None),
        )  # fmt: skip

    found = scores()
    assert found.shape == (2, 3, len(EXACT_COSTS)) and len(done) == 6
    monkeypatch.setattr("rotpred.svm.low_shot._CHUNK", 2 * 18**2)
    np.testing.assert_allclose(scores(), found, rtol=0, atol=1e-12)
    for place, k in enumerate((1, 6)):
        for c in range(3):
            chosen = draw_samples(labels[:, c], k, classes=3, seed=(5, 1, k, c))
            for j, cost in enumerate(EXACT_COSTS):
                model = exact_svc(cost).fit(unit_rows(rows)[chosen], labels[chosen, c])
                decisions = model.decision_function(unit_rows(others))
                keep = truth[:, c] != 0
                expected = reference_ap(decisions[keep], truth[keep, c] == 1)
                assert found[place, c, j] == pytest.approx(expected, abs=1e-6)


def test_draws() -> None:
    """k positives first, then 2k negatives of three classes; none difficult, all different."""
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
