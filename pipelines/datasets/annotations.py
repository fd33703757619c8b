"""What data sets for detection and segmentation have in common: objects, masks, wrong entries."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.imaging.decode import ImageError, read_numbers

log = logging.getLogger(__name__)

_SHOWN = 5
_SLACK = 1.0  # pixels


@dataclass(frozen=True)
class Objects:
    """The objects of one image, K of them, in pixels of the upright stored image."""

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
    """(N,): of each image, unique: what predictions refer to (a VOC stem, COCO's id as text)."""
    sizes: npt.NDArray[np.int64]
    """(N, 2): height and width of each image, upright."""
    data_id: str
    """Short hash of names, sizes and annotations."""
    kind: Literal["objects", "masks"]
    """Which of the two functions below it has."""
    outlined: bool
    """Whether objects have outlines."""
    least_side: int
    """Images with a shorter side, in pixels, are not trained on."""

    def __len__(self) -> int:
        """N."""

    def path(self, i: int) -> Path:
        """The image."""

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
                f"{len(self.found)} wrong annotations, max_undecodable is {self.budget}: "
                + "; ".join(self.found[:_SHOWN])
                + (f"; and {more} more" if more > 0 else "")
            )
        log.warning("left out: %s: %s", where, what)


class ObjectSamples:
    """A data set of boxes, with what its parser has found. A `DenseSamples`."""

    kind: Literal["objects", "masks"] = "objects"
    outlined = False

    def __init__(
        self,
        classes: Sequence[str],
        images: Sequence[AnnotatedImage],
        objects: Sequence[Objects],
        *,
        least_side: int = 0,
        identity: Iterable[bytes] = (),
    ) -> None:
        self.classes = tuple(classes)
        self.names = tuple(image.name for image in images)
        self.sizes = _sizes(images)
        self.least_side = least_side
        """Images with a shorter side are not trained on."""
        self._paths = [image.path for image in images]
        self._objects = objects
        columns = [(one.boxes, one.labels, one.difficult, one.crowd) for one in objects]
        rows = (array.tobytes() for arrays in columns for array in arrays)
        self.data_id = _hash(self.classes, images, itertools.chain(rows, identity))

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        """The image."""
        return Path(self._paths[i])

    def objects(self, i: int) -> Objects:
        """Its objects."""
        return self._objects[i]

    def mask(self, i: int) -> npt.NDArray[np.uint8]:
        """Raises `ValueError`."""
        raise ValueError(f"{self.names[i]} has objects, no mask")


class MaskSamples:
    """A data set of masks in PNG files. A `DenseSamples`."""

    kind: Literal["objects", "masks"] = "masks"
    outlined = False
    least_side = 0

    def __init__(
        self,
        classes: Sequence[str],
        images: Sequence[AnnotatedImage],
        masks: Sequence[str],
        table: npt.NDArray[np.int64],
    ) -> None:
        """
        Args:
            classes: names.
            images: which.
            masks: the PNG file of each, with one number a pixel.
            table: (256,), what each number in the files stands for: a class, 255 where no pixel
                counts, -1 where it is a mistake.
        """
        self.classes = tuple(classes)
        self.names = tuple(image.name for image in images)
        self.sizes = _sizes(images)
        self._paths, self._masks = [image.path for image in images], masks
        self._table, self._wrong = table.astype(np.uint8), table < 0
        lengths = (os.path.getsize(mask).to_bytes(8, "little") for mask in masks)
        self.data_id = _hash(self.classes, images, lengths)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        """The image."""
        return Path(self._paths[i])

    def objects(self, i: int) -> Objects:
        """Raises `ValueError`."""
        raise ValueError(f"{self.names[i]} has a mask, no objects")

    def mask(self, i: int) -> npt.NDArray[np.uint8]:
        """uint8 (h, w), classes and 255.

        Raises:
            ImageError: damaged, of another size than the image, or with a number that stands for
                nothing; it begins with the file's path.
        """
        numbers = read_numbers(self._masks[i])
        if numbers.shape != tuple(self.sizes[i]):
            height, width = self.sizes[i]
            raise ImageError(
                f"{self._masks[i]}: {numbers.shape[1]}x{numbers.shape[0]} pixels, the image has "
                f"{width}x{height}"
            )
        if (mistakes := self._wrong[numbers]).any():
            wrong = int(numbers[mistakes][0])
            raise ImageError(
                f"{self._masks[i]}: pixels of the number {wrong}, which is none of the "
                f"{len(self.classes)} classes"
            )
        return self._table[numbers]


class AnnotatedImage(NamedTuple):
    """A file of a data set."""

    name: str
    path: str
    height: int
    """Upright, in pixels."""
    width: int


def clip(
    left: float, top: float, right: float, bottom: float, *, height: int, width: int
) -> tuple[float, float, float, float]:
    """A box within its image.

    A pixel beyond the border is cut off: annotators count from 0 or 1, and round.

    Raises:
        ValueError: it lies further outside, or has no area; in words.
    """
    box = (left, top, right, bottom)
    if not all(math.isfinite(v) for v in box):
        raise ValueError(f"the box {_words(*box)} is not finite")
    if left < -_SLACK or top < -_SLACK or right > width + _SLACK or bottom > height + _SLACK:
        raise ValueError(f"the box {_words(*box)} leaves the image of {width}x{height} pixels")
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if right <= left or bottom <= top:
        raise ValueError(f"the box {_words(*box)} has no area")
    return left, top, right, bottom


def _words(left: float, top: float, right: float, bottom: float) -> str:
    return f"{left:g},{top:g} to {right:g},{bottom:g}"


def pack(rows: Sequence[tuple[tuple[float, float, float, float], int, bool, bool]]) -> Objects:
    """Objects of rows of box, label, difficult and crowd."""
    boxes, labels, difficult, crowd = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Objects(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(difficult, bool),
        np.array(crowd, bool),
    )


def _sizes(images: Sequence[AnnotatedImage]) -> npt.NDArray[np.int64]:
    return np.array([(one.height, one.width) for one in images], np.int64).reshape(-1, 2)


def _hash(classes: tuple[str, ...], images: Sequence[AnnotatedImage], rest: Iterable[bytes]) -> str:
    total = hashlib.sha256(repr(classes).encode())
    for one in images:
        total.update(f"{one.name}\0{one.height} {one.width}\n".encode())
    for part in rest:
        total.update(part)
    return total.hexdigest()[:16]


IGNORED = 255
"""Class of pixels that do not count, in masks of every data set here."""
