"""Cityscapes: the finely annotated images, with the 19 classes of its benchmark."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pipelines.datasets.annotations import IGNORED, AnnotatedImage, AnnotationErrors, MaskSamples
from pipelines.datasets.files import IndexFormatError, require_folder
from pipelines.imaging.decode import ImageError, describe_error, image_size

CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
    "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle",
    "bicycle",
)  # fmt: skip
"""Names by train id."""

LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label id of each class, as stored in the masks (cityscapesscripts/helpers/labels.py)."""

_LABELS = 34  # ids 0 to 33; those without a class are ignored
_IMAGE, _MASK = "_leftImg8bit.png", "_gtFine_labelIds.png"


def index_masks(
    split: str,
    root: str | os.PathLike[str],
    *,
    errors: AnnotationErrors,
    limit: int | None = None,
) -> MaskSamples:
    """Index the images in leftImg8bit/SPLIT and their masks of label ids in gtFine/SPLIT.

    Args:
        split: train or val.
        root: The folder that contains leftImg8bit and gtFine.
        errors: Counts the images that are unreadable or have no mask.
        limit: Number of images to take, in the order of names. None: all.

    Raises:
        FileNotFoundError: A folder is missing.
        ValueError: No image is left, or there are too many errors.
    """
    base, truth = (require_folder(Path(root, name, split)) for name in ("leftImg8bit", "gtFine"))
    images: list[AnnotatedImage] = []
    paths: list[str] = []
    for path in sorted(base.glob(f"*/*{_IMAGE}"))[:limit]:
        stem = path.name.removesuffix(_IMAGE)
        mask = truth / path.parent.name / f"{stem}{_MASK}"
        try:
            if not mask.is_file():
                raise FileNotFoundError(f"no mask {str(mask)!r}")
            images.append(AnnotatedImage(stem, str(path), *image_size(str(path))))
        except (OSError, ImageError) as error:
            errors.add(str(path), describe_error(error))
        else:
            paths.append(str(mask))
    if not images:
        raise IndexFormatError(f"no image CITY/*{_IMAGE} is left in {str(base)!r}")
    table = np.full(256, -1, np.int64)
    table[:_LABELS], table[IGNORED] = IGNORED, IGNORED
    table[list(LABEL_IDS)] = np.arange(len(LABEL_IDS))
    return MaskSamples(CITYSCAPES_CLASSES, images, paths, table)
