"""Input of a conversion: the images, and what their data set demands of it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pipelines.arrays import Int8
from pipelines.datasets.images import Split, open_images
from pipelines.datasets.voc_classification import voc2007
from pipelines.samples import Samples


class ConversionInput(NamedTuple):
    """What `write_beton` is called with, and labels that a beton cannot hold."""

    images: Samples
    """The images, with at most one label each."""
    budget: int | None
    """Unusable files that may be left out; None for the default of `write_beton`."""
    labels: Int8 | None
    """int8 (N, C), for images with several labels: 1 present, -1 absent, 0 difficult."""


def open_input(
    source: str, *, root: Path | None, labelled: bool, split: Split, budget: int | None
) -> ConversionInput:
    """Open the images of a conversion.

    VOC2007 has several labels per image, whose rows are in the order of the images. So none may be
    left out.

    Args:
        source: As in `open_images`.
        root: As in `open_images`.
        labelled: False drops the labels.
        split: As in `open_images`.
        budget: Unusable files that may be left out; None for the default.

    Raises:
        FileNotFoundError: The data does not exist.
        ValueError: The data exists but is not a data set, or the options do not fit it.
    """
    kind, _, part = source.partition(":")
    if kind != "voc2007" or not labelled:
        images = open_images(source, root=root, labelled=labelled, split=split)
        return ConversionInput(images, budget, None)
    if root is None:
        raise ValueError(f"{source} needs --root: the folder VOC2007")
    if budget:
        raise ValueError("--budget is not for voc2007, whose labels need every image")
    found = voc2007(root, split=part)
    return ConversionInput(found.images, 0, found.targets)
