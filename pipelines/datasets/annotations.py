"""Common types of detection and segmentation data sets: objects, masks, annotation errors."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from pipelines.arrays import Bool, Float32, Int64, Uint8
from pipelines.imaging.decode import ImageError, read_label_png

log = logging.getLogger(__name__)

_SHOWN = 5  # in a message
_SLACK = 1.0  # pixels that a box may extend beyond its image

IGNORED = 255
"""Class of pixels that do not count, in the masks of all data sets."""


@dataclass(frozen=True)
class Objects:
    """The K objects of one image, in pixels of the upright stored image."""

    boxes: Float32
    """float32 (K, 4): left, top, right, bottom, counted from 0. Right and bottom are exclusive:
    right - left is the width."""
    labels: Int64
    """int64 (K,): class ids, counted from 0."""
    difficult: Bool
    """bool (K,): VOC's difficult flag. Evaluations do not count these."""
    crowd: Bool
    """bool (K,): COCO's iscrowd flag, a region of many objects. Never trained on."""
    outlines: tuple[object, ...] = ()
    """K polygons or run lengths, as COCO stores them; () if there are boxes only."""


class AnnotatedImage(NamedTuple):
    """An image file and its size."""

    name: str
    path: str
    height: int
    """Of the upright image, in pixels."""
    width: int
    """Of the upright image, in pixels."""


class DenseSamples:
    """A detection or segmentation data set of N images."""

    kind: Literal["objects", "masks"]
    """Whether it has `objects` or masks (`mask`)."""
    outlined = False
    """Whether objects have outlines."""
    least_side = 0
    """Smallest side of an image that is trained on, in pixels."""

    def __init__(
        self, classes: Sequence[str], images: Sequence[AnnotatedImage], content: Iterable[bytes]
    ) -> None:
        """
        Args:
            classes: Class names by id.
            images: The N images.
            content: Bytes that identify objects or masks.
        """
        self.classes = tuple(classes)
        """Class names by id."""
        self.category_ids = tuple(range(1, len(classes) + 1))
        """The number of each class in files of predictions."""
        self.names = tuple(image.name for image in images)
        """N unique names that predictions refer to (VOC: the stem; COCO: the id as text)."""
        sizes = [(image.height, image.width) for image in images]
        self.sizes = np.array(sizes, np.int64).reshape(-1, 2)
        """int64 (N, 2): height and width of each upright image, in pixels."""
        self._paths = [image.path for image in images]
        total = hashlib.sha256(repr(self.classes).encode())
        for image in images:
            total.update(f"{image.name}\0{image.height} {image.width}\n".encode())
        for part in content:
            total.update(part)
        self.data_id = total.hexdigest()[:16]
        """Short hash of names, sizes and annotations."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.names)

    def path(self, i: int) -> Path:
        """Return the path of image i."""
        return Path(self._paths[i])

    def objects(self, i: int) -> Objects:
        """Return the objects of image i. Raises `ValueError` if the data set has masks."""
        raise ValueError(f"{self.names[i]} has a mask but no objects")

    def mask(self, i: int) -> Uint8:
        """Return the mask of image i, uint8 (h, w): class ids and `IGNORED`.

        Raises:
            ImageError: As for `read_mask`.
            ValueError: The data set has objects.
        """
        raise ValueError(f"{self.names[i]} has objects but no mask")

    def read_mask(self, i: int, path: str | os.PathLike[str], table: Int64) -> Uint8:
        """Read a mask of image i: a PNG file with one number per pixel.

        Args:
            i: Position of the image.
            path: The file.
            table: int64 (256,), maps numbers in the file to class ids, `IGNORED`, or -1 (an error).

        Returns:
            uint8 (h, w): class ids and `IGNORED`.

        Raises:
            ImageError: The file is damaged, has another size than the image, or contains a number
                without a class. The message starts with the path of the file.
        """
        numbers = read_label_png(path)
        if numbers.shape != tuple(self.sizes[i]):
            height, width = self.sizes[i]
            raise ImageError(
                f"{path}: {numbers.shape[1]}x{numbers.shape[0]} pixels, the image has "
                f"{width}x{height}"
            )
        if (mistakes := (table < 0)[numbers]).any():
            raise ImageError(
                f"{path}: pixels of the number {numbers[mistakes][0]}, which is none of the "
                f"{len(self.classes)} classes"
            )
        return table.astype(np.uint8)[numbers]


@dataclass
class AnnotationErrors:
    """Wrong annotations found so far, up to a limit."""

    budget: int
    """Number of wrong annotations that may be left out."""
    found: list[str] = field(default_factory=list)
    """One message each, starting with the file and the line or id."""

    def add(self, where: str, what: str) -> None:
        """Record a wrong annotation.

        Args:
            where: File, and line or id.
            what: What is wrong.

        Raises:
            ValueError: There are now more than `budget`.
        """
        self.found.append(f"{where}: {what}")
        if len(self.found) > self.budget:
            more = len(self.found) - _SHOWN
            raise ValueError(
                f"{len(self.found)} wrong annotations, max_invalid_annotations is {self.budget}: "
                + "; ".join(self.found[:_SHOWN])
                + (f"; and {more} more" if more > 0 else "")
            )
        log.warning("left out: %s: %s", where, what)


class ObjectSamples(DenseSamples):
    """Images with the objects that a parser has found."""

    kind = "objects"

    def __init__(
        self,
        classes: Sequence[str],
        images: Sequence[AnnotatedImage],
        objects: Sequence[Objects],
        *,
        outlines: Iterable[bytes] = (),
    ) -> None:
        """
        Args:
            classes: Class names by id.
            images: The N images.
            objects: Boxes and flags of each image.
            outlines: Bytes that identify the outlines, if there are any.
        """
        self._objects = objects
        columns = [(one.boxes, one.labels, one.difficult, one.crowd) for one in objects]
        rows = (array.tobytes() for arrays in columns for array in arrays)
        super().__init__(classes, images, itertools.chain(rows, outlines))

    def objects(self, i: int) -> Objects:
        """Return the objects of image i."""
        return self._objects[i]


class MaskSamples(DenseSamples):
    """Images with one PNG mask each."""

    kind = "masks"

    def __init__(
        self,
        classes: Sequence[str],
        images: Sequence[AnnotatedImage],
        masks: Sequence[str],
        table: Int64,
    ) -> None:
        """
        Args:
            classes: Class names by id.
            images: The N images.
            masks: N paths of PNG files.
            table: As for `read_mask`.
        """
        self._masks, self._table = masks, table
        lengths = (os.path.getsize(mask).to_bytes(8, "little") for mask in masks)
        super().__init__(classes, images, lengths)

    def mask(self, i: int) -> Uint8:
        """Return the mask of image i, uint8 (h, w): class ids and `IGNORED`."""
        return self.read_mask(i, self._masks[i], self._table)


def clip(
    left: float, top: float, right: float, bottom: float, *, height: int, width: int
) -> tuple[float, float, float, float]:
    """Clip a box to its image.

    At most one pixel is cut off on each side: annotators count from 0 or from 1, and round.

    Raises:
        ValueError: The box extends further beyond the image, has no area or is not finite.
    """
    box = (left, top, right, bottom)
    if not all(math.isfinite(v) for v in box):
        raise ValueError(f"the box {_format_box(*box)} is not finite")
    if left < -_SLACK or top < -_SLACK or right > width + _SLACK or bottom > height + _SLACK:
        raise ValueError(f"the box {_format_box(*box)} leaves the image of {width}x{height} pixels")
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if right <= left or bottom <= top:
        raise ValueError(f"the box {_format_box(*box)} has no area")
    return left, top, right, bottom


def _format_box(left: float, top: float, right: float, bottom: float) -> str:
    return f"{left:g},{top:g} to {right:g},{bottom:g}"


def pack(
    rows: Sequence[tuple[tuple[float, float, float, float], int, bool, bool]],
    outlines: Sequence[object] = (),
) -> Objects:
    """Build `Objects` from rows of box, label, difficult and crowd."""
    boxes, labels, difficult, crowd = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Objects(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(difficult, bool),
        np.array(crowd, bool),
        tuple(outlines),
    )
