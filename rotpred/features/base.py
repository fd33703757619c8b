"""`Features`: the feature arrays of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Store = Literal["float32", "float16"]
"""Dtype of feature arrays on disk."""


@dataclass(frozen=True)
class Features:
    """Features of a data set of N samples; large arrays are memory-mapped and read-only."""

    stages: dict[str, npt.NDArray[np.floating]]
    """By name of the stage, or `AVGPOOL`: (N, D)."""
    labels: npt.NDArray[np.int64]
    """(N,): class ids, -1 without labels."""
    indices: npt.NDArray[np.int64]
    """(N,): position of each sample in the data set's index, ascending."""
    data_id: str
    """The loader's fingerprint of the data set."""
    classes: tuple[str, ...] = ()
    """Class names, empty where the data set has none."""
