"""Average precision of ranked scores."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


def average_precision(scores: Float64, positive: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Return the AP of the published code, and the 11-point AP of the VOC2007 challenge beside it.

    Published (mmselfsup svm_helper.py `get_precision_recall`, VISSL the same): the area under the
    precision envelope at every change of recall, as VOC has it since 2010, though the data are of
    2007. Equal scores keep the order of the samples.

    Args:
        scores: (N,), higher for positive.
        positive: (N,); samples to be ignored must be left out by the caller.

    Raises:
        ValueError: there is no positive sample, or a score is not finite.
    """
    if not positive.any():
        raise ValueError("average precision needs a positive sample")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite")
    return average_precision_of(
        positive[np.argsort(-scores, kind="stable")], int(np.count_nonzero(positive))
    )


def average_precision_of(hits: npt.NDArray[np.bool_], positives: int) -> tuple[float, float]:
    """Return the area under the precision envelope, and VOC2007's 11-point AP, of a ranking.

    Args:
        hits: (N,), best first: whether each place is one of the positives, none of them twice.
        positives: how many there are, at least 1; those that are not in the ranking are missed.
    """
    places = np.flatnonzero(hits)  # recall changes here only
    precision = np.arange(1, len(places) + 1) / (places + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # Recall is at least r/10 from the ceil(r/10 * positives)-th hit on; in integers, as tenths of a
    # recall are not what floating point makes of them.
    first = [max(0, -(-tenth * positives // 10) - 1) for tenth in range(11)]
    reached = envelope[[place for place in first if place < len(envelope)]]
    return float(envelope.sum() / positives), float(reached.sum() / len(first))
