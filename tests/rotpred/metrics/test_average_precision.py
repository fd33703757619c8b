"""Average precision of one class: area under the envelope and 11-point."""

from __future__ import annotations

import numpy as np
import pytest

from rotpred.metrics.average_precision import average_precision
from tests.support.references import reference_ap

pytestmark = pytest.mark.timeout(120)


def test_average_precision() -> None:
    """Both definitions on a case computed by hand: hits at ranks 1, 3 and 6."""
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    truth = np.array([True, False, True, False, False, True])
    published, eleven = average_precision(scores, truth)
    assert published == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    # Recall 0 to 0.3: 1; 0.4 to 0.6: 2/3; from 0.7 on: 1/2.
    assert eleven == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 1 / 2) / 11)
    generator = np.random.default_rng(0)
    for _ in range(20):
        scores, truth = generator.standard_normal(50), generator.random(50) < 0.3
        assert average_precision(scores, truth)[0] == pytest.approx(reference_ap(scores, truth))
    # Ten positives: recalls are exact tenths, which floating point misses.
    perfect = np.arange(20.0)
    assert average_precision(perfect, perfect >= 10) == (1.0, 1.0)
    with pytest.raises(ValueError, match="positive sample"):
        average_precision(scores, np.zeros(50, bool))
    with pytest.raises(ValueError, match="not finite"):
        average_precision(np.array([np.nan, 1]), np.array([True, False]))
