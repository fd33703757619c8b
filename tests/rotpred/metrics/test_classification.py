"""Classification metrics with masks, against NumPy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    jaccard_score,
    top_k_accuracy_score,
)

from pipelines.batch import IGNORE
from rotpred.distributed import Rank
from rotpred.metrics.classification import Confusion, TopK

pytestmark = pytest.mark.timeout(60)


def batches(n: int, classes: int, heads: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    logits = [torch.randn(n, classes) for _ in range(heads)]
    targets = torch.randint(classes, (n,))
    logits[-1][torch.arange(n), targets] += 1.0  # one head that is better than chance
    return logits, targets


def test_top_k_of_several_heads_follows_sklearn() -> None:
    n, classes, heads = 203, 11, 3
    logits, targets = batches(n, classes, heads)
    valid = torch.rand(n) < 0.7
    targets[~valid] = IGNORE
    metric = TopK(ks=(1, 5), heads=heads)
    for start in range(0, n, 50):
        part = slice(start, start + 50)
        metric.update([x[part] for x in logits], targets[part], valid[part])
    labels = np.arange(classes)
    truth = targets[valid].numpy()
    for head, got in enumerate(metric.compute(Rank())):
        scores = logits[head][valid].numpy()
        for k in (1, 5):
            expected = top_k_accuracy_score(truth, scores, k=k, labels=labels)
            assert got[f"top{k}"] == pytest.approx(expected, abs=1e-12)
        assert got["n"] == valid.sum().item()


def test_invalid_samples_count_neither_as_hits_nor_as_samples() -> None:
    logits = torch.eye(4)
    targets = torch.arange(4)
    valid = torch.tensor([True, False, True, False])
    targets[2] = 0
    metric = TopK(ks=(1,))
    metric.update(logits, targets, valid)  # the masked rows would both be hits
    assert metric.compute(Rank()) == [{"top1": 0.5, "n": 2.0}]


def test_splitting_over_ranks_changes_nothing() -> None:
    logits, targets = batches(64, 8, 1)
    valid = torch.rand(64) < 0.5
    whole, parts = TopK(), [TopK(), TopK()]
    whole.update(logits[0], targets, valid)
    for rank, part in enumerate(parts):
        part.update(logits[0][rank::2], targets[rank::2], valid[rank::2])
    parts[0].sums += parts[1].sums
    assert parts[0].compute(Rank()) == whole.compute(Rank()) == whole.compute(Rank())


def test_top_k_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ValueError, match="no valid sample"):
        TopK().compute(Rank())
    with pytest.raises(ValueError, match="more than 4 classes"):
        TopK().update(torch.zeros(2, 4), torch.zeros(2).long(), torch.ones(2).bool())
    with pytest.raises(ValueError, match="for 2 heads"):
        TopK(heads=2).update(torch.zeros(2, 9), torch.zeros(2).long(), torch.ones(2).bool())
    unlabelled = TopK(ks=(1,))
    unlabelled.update(torch.zeros(2, 4), torch.tensor([0, -1]), torch.ones(2).bool())
    with pytest.raises(ValueError, match="1 of 2 valid targets"):
        unlabelled.compute(Rank())


def test_an_undecided_network_is_not_right() -> None:
    # Counting strictly larger logits would score every constant or NaN output as right.
    targets = torch.arange(4).repeat(25)
    for value in (0.0, float("nan")):
        metric = TopK(ks=(1,))
        metric.update(torch.full((100, 4), value), targets, torch.ones(100).bool())
        assert metric.compute(Rank())[0]["top1"] <= 0.5


def test_confusion_follows_sklearn_on_pixels() -> None:
    torch.manual_seed(1)
    n, shape = 6, (3, 17, 19)
    targets, predictions = torch.randint(n - 1, shape), torch.randint(n - 1, shape)
    valid = torch.rand(shape) < 0.8
    targets[~valid] = 255
    metric = Confusion(n)
    for k in range(3):
        metric.update(predictions[k], targets[k], valid[k])
    got = metric.compute(Rank())
    t, p = targets[valid].numpy(), predictions[valid].numpy()
    assert got.matrix == confusion_matrix(t, p, labels=range(n)).tolist()
    present = list(range(n - 1))
    iou = jaccard_score(t, p, labels=present, average=None)
    assert got.iou[:-1] == pytest.approx(iou.tolist())
    assert got.iou[-1] is None and got.recall[-1] is None, "class 5 never occurs"
    assert got.mean_iou == pytest.approx(iou.mean())
    assert got.mean_recall == pytest.approx(balanced_accuracy_score(t, p))
    assert got.accuracy == pytest.approx((t == p).mean())
    assert got.n == valid.sum().item()


def test_a_class_that_is_only_predicted_lowers_the_mean_iou() -> None:
    metric = Confusion(3)
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.ones(2).bool())
    got = metric.compute(Rank())
    assert got.iou == [0.5, 0.0, None]
    assert got.mean_iou == 0.25
    assert got.mean_recall == 0.5


def test_confusion_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ValueError, match="no valid sample"):
        Confusion(2).compute(Rank())
    with pytest.raises(ValueError, match="shapes differ"):
        Confusion(2).update(torch.zeros(2).long(), torch.zeros(3).long(), torch.ones(2).bool())
    for target, prediction in ((255, 0), (0, 2), (-1, 1)):
        metric = Confusion(2)
        metric.update(torch.tensor([prediction]), torch.tensor([target]), torch.ones(1).bool())
        with pytest.raises(ValueError, match="not among the classes"):
            metric.compute(Rank())
