"""What data sets for detection and segmentation have in common: objects, masks, wrong entries."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)

_SHOWN = 5


@dataclass(frozen=True)
class Objects:
    """The objects of one picture, K of them, in pixels of the upright stored picture."""

    boxes: npt.NDArray[np.float32]
    """(K, 4): left, top, right, bottom, counted from 0; right and bottom lie behind the last pixel,
    so that right - left is the width."""
    labels: npt.NDArray[np.int64]
    """(K,): position among the classes, from 0."""
    difficult: npt.NDArray[np.bool_]
    """(K,): VOC's difficult: no evaluation counts it."""
    crowd: npt.NDArray[np.bool_]
    """(K,): COCO's iscrowd: a region of many objects; never trained on."""
    outlines: tuple[object, ...] = ()
    """K polygons or run lengths as COCO stores them; () where there are boxes only."""


class DenseSamples(Protocol):
    """One data set."""

    classes: tuple[str, ...]
    """Names."""
    names: tuple[str, ...]
    """(N,): of each picture, unique: what predictions refer to (a VOC stem, COCO's id as text)."""
    sizes: npt.NDArray[np.int64]
    """(N, 2): height and width of each picture, upright."""
    data_id: str
    """Short hash of names, sizes and annotations."""

    def __len__(self) -> int:
        """N."""

    def path(self, i: int) -> Path:
        """The picture."""

    def objects(self, i: int) -> Objects:
        """Its objects. ValueError for a data set of masks."""

    def mask(self, i: int) -> npt.NDArray[np.uint8]:
        """uint8 (h, w), classes and `dense_spec.IGNORED`. ValueError for one of objects."""


@dataclass
class Problems:
    """Wrong annotations met so far, each in words with file and line or id."""

    budget: int
    """How many may be left out."""
    found: list[str] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        """Count one.

        Raises:
            ValueError: it is one more than the budget.
        """
        self.found.append(f"{where}: {what}")
        if len(self.found) > self.budget:
            more = len(self.found) - _SHOWN
            raise ValueError(
                f"{len(self.found)} wrong annotations, max_bad is {self.budget}: "
                + "; ".join(self.found[:_SHOWN])
                + (f"; and {more} more" if more > 0 else "")
            )
        log.warning("left out: %s: %s", where, what)
