"""Detections of an image from plain numbers."""

from __future__ import annotations

import numpy as np

from rotpred.metrics.detections import ImageDetections


def found(*rows: tuple[float, float, float, float, int, float]) -> ImageDetections:
    """Detections of one image, from (left, top, right, bottom, label, score) each."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    return ImageDetections(
        boxes=table[:, :4].astype(np.float32),
        labels=table[:, 4].astype(np.int64),
        scores=table[:, 5].astype(np.float32),
    )
