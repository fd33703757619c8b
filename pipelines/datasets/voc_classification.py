"""VOC2007 classification: any number of labels per image."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from pipelines.arrays import Int8
from pipelines.datasets.files import IndexFormatError, read_lines, require_folder
from pipelines.datasets.index import SampleIndex

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
"""The classes of VOC2007, in alphabetical order."""


@dataclass(frozen=True, eq=False)
class MultiLabelIndex:
    """Images with any number of labels each."""

    images: SampleIndex
    """The images. `images.labels` is -1 for all of them."""
    targets: Int8
    """int8 (N, C): 1 present, -1 absent, 0 present but difficult."""
    classes: tuple[str, ...]
    """C names, one per column of `targets`."""


def voc2007(root: str | os.PathLike[str], *, split: str) -> MultiLabelIndex:
    """Read images and labels of the VOC2007 classification task.

    Args:
        root: The folder VOCdevkit/VOC2007.
        split: train, val, trainval or test.

    Raises:
        FileNotFoundError: A file, folder or image is missing.
        IndexFormatError: A line is malformed, or the files of the classes name different images.
    """
    base = require_folder(root)
    columns: list[list[int]] = []
    listed: list[str] = []
    locations: list[str] = []
    for name in VOC_CLASSES:
        source = base / "ImageSets" / "Main" / f"{name}_{split}.txt"
        column: list[int] = []
        for row, (location, line) in enumerate(read_lines(source)):
            entry, _, value = line.partition(" ")
            if value.strip() not in ("-1", "0", "1"):
                raise IndexFormatError(f"{location}: expected `image -1|0|1`, found {line[:200]!r}")
            if not columns:
                listed.append(entry)
                locations.append(location)
            elif row >= len(listed) or listed[row] != entry:
                raise IndexFormatError(
                    f"{location}: {entry!r} is not the image in this line of other classes"
                )
            column.append(int(value))
        if len(column) != len(listed):
            raise IndexFormatError(f"{source}: {len(column)} lines, expected {len(listed)}")
        columns.append(column)
    names = [f"JPEGImages/{entry}.jpg" for entry in listed]
    images = SampleIndex.from_names(base, names, [-1] * len(names), ())
    images.require_files(locations.__getitem__)
    return MultiLabelIndex(images, np.array(columns, np.int8).T.copy(), VOC_CLASSES)
