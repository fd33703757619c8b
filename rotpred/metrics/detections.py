"""`ImageDetections`: the detected objects of one image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipelines.arrays import Float32, Int64


@dataclass(frozen=True, eq=False)
class ImageDetections:
    """K detected objects of one image, in pixels of the stored, upright image."""

    boxes: Float32
    """(K, 4): left, top, right, bottom; the width is right - left, as in `Objects`."""
    labels: Int64
    """(K,): class numbers from 0."""
    scores: Float32
    """(K,): confidences, higher is more confident."""
    masks: tuple[Mapping[str, object], ...] = ()
    """K masks {"size": [height, width], "counts": str}, COCO's compressed run lengths (counts may
    be bytes); () for boxes only."""

    def __post_init__(self) -> None:
        k = len(self.boxes)
        shapes = self.boxes.shape, self.labels.shape, self.scores.shape
        if shapes != ((k, 4), (k,), (k,)) or len(self.masks) not in (0, k):
            raise ValueError(
                f"boxes {shapes[0]}, labels {shapes[1]}, scores {shapes[2]} and {len(self.masks)} "
                "masks do not fit each other: expected (K, 4), (K,), (K,) and 0 or K"
            )
        if not (np.isfinite(self.boxes).all() and np.isfinite(self.scores).all()):
            raise ValueError("a detected box or its score is not finite")
        masks = tuple(
            {**mask, "counts": counts.decode()}
            if isinstance(counts := mask["counts"], bytes)
            else mask
            for mask in self.masks
        )
        object.__setattr__(self, "masks", masks)
