"""The feature arrays of a data set, and their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

AVGPOOL = "avgpool"
"""The global average of the last map, beside the names of the stages."""

Store = Literal["float32", "float16"]


@dataclass(frozen=True)
class Features:
    """Of one data set, N samples; large arrays are memory-mapped and read-only."""

    stages: dict[str, npt.NDArray[np.floating]]
    """(N, D) by name of the stage, or `AVGPOOL`."""
    labels: npt.NDArray[np.int64]
    """(N,): class ids, -1 without labels."""
    indices: npt.NDArray[np.int64]
    """(N,): position of each sample in the data set's index, rising."""
    data_id: str
    """What the loader calls the data set."""
    classes: tuple[str, ...] = ()
    """Class names, empty where the data set has none."""
