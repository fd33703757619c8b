"""Average precision of ranked scores."""

from __future__ import annotations

import numpy as np

from pipelines.arrays import Bool, Float64


def average_precision(scores: Float64, positive: Bool) -> tuple[float, float]:
    """Return the AP of the published code and the 11-point AP of VOC2007.

    Published (mmselfsup svm_helper.py `get_precision_recall`; VISSL is the same): the area under
    the precision envelope at every change of recall. That is VOC's AP since 2010, though the data
    are of 2007. Equal scores keep the order of the samples.

    Args:
        scores: float64 (N,), higher means positive.
        positive: bool (N,); the caller leaves out ignored samples.

    Raises:
        ValueError: There is no positive sample, or a score is not finite.
    """
    if not positive.any():
        raise ValueError("average precision needs a positive sample")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite")
    return average_precision_of(
        positive[np.argsort(-scores, kind="stable")], int(np.count_nonzero(positive))
    )


def average_precision_of(hits: Bool, positives: int) -> tuple[float, float]:
    """Return the area under the precision envelope and VOC2007's 11-point AP of a ranking.

    Args:
        hits: bool (N,), best first: whether each entry is a positive; no positive occurs twice.
        positives: Number of positives, at least 1; those not in the ranking count as missed.
    """
    hit_ranks = np.flatnonzero(hits)  # recall changes only here
    precision = np.arange(1, len(hit_ranks) + 1) / (hit_ranks + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # Recall is at least r/10 from the ceil(r/10 * positives)-th hit on. Computed in integers,
    # because floating point cannot represent tenths exactly.
    first = [max(0, -(-tenth * positives // 10) - 1) for tenth in range(11)]
    reached = envelope[[hit for hit in first if hit < len(envelope)]]
    return float(envelope.sum() / positives), float(reached.sum() / len(first))
