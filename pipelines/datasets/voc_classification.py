"""VOC2007 classification: several labels per image."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.datasets.files import IndexFormatError, _folder, _lines
from pipelines.datasets.index import SampleIndex

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
"""VOC2007's classes, in the order of their files' names."""


@dataclass(frozen=True, eq=False)
class MultiLabelled:
    """Images that each have any number of classes."""

    images: SampleIndex
    """The images; their own labels are -1."""
    targets: npt.NDArray[np.int8]
    """(N, C): 1 present, -1 absent, 0 present but difficult."""
    classes: tuple[str, ...]
    """(C,): names of the columns."""


def voc2007(root: str | os.PathLike[str], *, split: str) -> MultiLabelled:
    """VOC2007's classification task.

    Args:
        root: The folder VOCdevkit/VOC2007.
        split: train, val, trainval or test.

    Raises:
        FileNotFoundError: A file, folder or image is missing.
        IndexFormatError: A line is wrong, or the classes' files name different images.
    """
    base = _folder(root)
    columns: list[list[int]] = []
    listed: list[str] = []
    places: list[str] = []
    for name in VOC_CLASSES:
        source = base / "ImageSets" / "Main" / f"{name}_{split}.txt"
        column: list[int] = []
        for row, (place, line) in enumerate(_lines(source)):
            entry, _, value = line.partition(" ")
            if value.strip() not in ("-1", "0", "1"):
                raise IndexFormatError(f"{place}: expected `image -1|0|1`, found {line[:200]!r}")
            if not columns:
                listed.append(entry)
                places.append(place)
            elif row >= len(listed) or listed[row] != entry:
                raise IndexFormatError(f"{place}: {entry!r} is not the image of other classes")
            column.append(int(value))
        if len(column) != len(listed):
            raise IndexFormatError(f"{source}: {len(column)} lines, expected {len(listed)}")
        columns.append(column)
    names = [f"JPEGImages/{entry}.jpg" for entry in listed]
    images = SampleIndex.from_names(base, names, [-1] * len(names), ())
    images.require_files(places.__getitem__)
    return MultiLabelled(images, np.array(columns, np.int8).T.copy(), VOC_CLASSES)
