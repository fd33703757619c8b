"""PASCAL VOC detection and segmentation, and other data sets in VOC's layout.

A folder contains JPEGImages, Annotations with one XML file per image, and lists of images in
ImageSets/Main. For segmentation it contains SegmentationClass and ImageSets/Segmentation. SBD's
masks (Hariharan et al., ICCV 2011) are in SegmentationClassAug, where mmsegmentation's converter
and other packages put them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from pipelines.datasets.annotations import (
    IGNORED,
    AnnotatedImage,
    AnnotationErrors,
    MaskSamples,
    Objects,
    ObjectSamples,
    pack,
)
from pipelines.datasets.files import IndexFormatError, read_lines, require_folder
from pipelines.datasets.listing import EXTENSIONS
from pipelines.datasets.voc_annotation import Fields, XmlError, parse_object, read_xml
from pipelines.datasets.voc_classification import VOC_CLASSES
from pipelines.imaging.decode import ImageError, describe_error, image_size

_YEAR = re.compile(r"\d{4}")
_READERS = 16  # threads, to overlap the latency of network file systems

T = TypeVar("T")


class ListedImage(NamedTuple):
    """One line of a list of images."""

    location: str
    """file:line."""
    folder: Path
    """The folder that contains JPEGImages."""
    stem: str
    """File name of the image, without extension."""
    label: Path
    """Its annotation or its mask."""


def index_boxes(
    parts: str,
    root: str | os.PathLike[str],
    *,
    errors: AnnotationErrors,
    classes: Sequence[str] = (),
    limit: int | None = None,
) -> ObjectSamples:
    """Index images with boxes.

    Corners in the files count from 1 and are inclusive. A box is (xmin - 1, ymin - 1, xmax, ymax),
    as in detectron2 (detectron2/data/datasets/pascal_voc.py). Sizes are read from the images: many
    tools write other sizes into the XML.

    Args:
        parts: DIR/LIST+..., the part of `DenseSpec.data` after the colon.
        root: The folder that contains DIR.
        errors: Counts wrong objects, and images whose file or annotation is missing.
        classes: Class names. Empty: VOC's.
        limit: Number of lines to take. None: all.

    Raises:
        FileNotFoundError: A folder or list is missing.
        ValueError: A list is malformed, no image is left, or there are too many errors.
    """
    names = tuple(classes) or VOC_CLASSES
    images: list[AnnotatedImage] = []
    found: list[Objects] = []
    for one, image, entries in _images(parts, Path(root), "Main", limit, errors, _annotation):
        if isinstance(entries, XmlError):
            errors.add(f"{one.label}:{entries.line}", str(entries))
            continue
        rows = []
        for entry in entries:
            try:
                rows.append(parse_object(entry, names, image.height, image.width))
            except XmlError as error:
                errors.add(f"{one.label}:{error.line}", str(error))
        images.append(image)
        found.append(pack(rows))
    if not images:
        raise IndexFormatError(f"{parts}: no image is left below {os.fspath(root)!r}")
    return ObjectSamples(names, images, found)


def index_masks(
    parts: str,
    root: str | os.PathLike[str],
    *,
    errors: AnnotationErrors,
    classes: Sequence[str] = (),
    limit: int | None = None,
) -> MaskSamples:
    """Index images with masks. Class 0 is the background, followed by the classes.

    For lists with `aug` in their names, masks are read from SegmentationClassAug, which includes
    those of VOC's own lists. For all other lists, they are read from SegmentationClass.

    Args:
        parts, root, errors, limit: As for `index_boxes`.
        classes: Class names without the background. Empty: VOC's.

    Raises:
        FileNotFoundError, ValueError: As `index_boxes`.
    """
    names = ("background", *(tuple(classes) or VOC_CLASSES))
    images: list[AnnotatedImage] = []
    paths: list[str] = []
    for one, image, present in _images(
        parts, Path(root), "Segmentation", limit, errors, lambda one: one.label.is_file()
    ):
        if present:
            images.append(image)
            paths.append(str(one.label))
        else:
            errors.add(one.location, f"{one.label}: a file that does not exist")
    if not images:
        raise IndexFormatError(f"{parts}: no image is left below {os.fspath(root)!r}")
    table = np.full(256, -1, np.int64)
    table[: len(names)], table[IGNORED] = np.arange(len(names)), IGNORED
    return MaskSamples(names, images, paths, table)


def _listed(parts: str, root: Path, task: str, limit: int | None) -> list[ListedImage]:
    """Read the first `limit` lines of all lists together."""
    found: list[ListedImage] = []
    seen: dict[str, str] = {}
    for part in parts.split("+"):
        folder, _, name = part.rpartition("/")
        if not folder or not name:
            raise ValueError(f"expected DIR/LIST+..., as in 2007/trainval, found {part!r}")
        base = root / (f"VOC{folder}" if _YEAR.fullmatch(folder) else folder)
        labels, ending = "Annotations", ".xml"
        if task == "Segmentation":
            aug = "Aug" if "aug" in name.lower() else ""
            labels, ending = f"SegmentationClass{aug}", ".png"
        for location, stem in read_lines(base / "ImageSets" / task / f"{name}.txt"):
            if not re.fullmatch(r"[^\s/\\\0]+", stem) or stem in (".", ".."):
                raise IndexFormatError(
                    f"{location}: expected an image's name, found {stem[:200]!r}"
                )
            if stem in seen:
                raise IndexFormatError(
                    f"{location}: {stem!r} is listed twice, first in {seen[stem]}"
                )
            seen[stem] = location
            found.append(ListedImage(location, base, stem, base / labels / (stem + ending)))
    return found[:limit]


def _image_files(listed: Sequence[ListedImage]) -> dict[Path, dict[str, str]]:
    """List the paths of images, by folder and stem."""
    found: dict[Path, dict[str, str]] = {}
    for base in {one.folder for one in listed}:
        folder = require_folder(base / "JPEGImages")
        splits = (os.path.splitext(name) for name in sorted(os.listdir(folder)))
        found[base] = {
            stem: str(folder / (stem + ending))
            for stem, ending in splits
            if ending.lower() in EXTENSIONS
        }
    return found


def _images(
    parts: str,
    root: Path,
    task: str,
    limit: int | None,
    errors: AnnotationErrors,
    read: Callable[[ListedImage], T],
) -> Iterator[tuple[ListedImage, AnnotatedImage, T]]:
    """Yield the readable images of lists, each with the result of `read`, in order."""
    listed = _listed(parts, root, task, limit)
    files = _image_files(listed)

    def load(one: ListedImage) -> tuple[tuple[int, int] | str, T]:
        return _size(files[one.folder].get(one.stem)), read(one)

    with ThreadPoolExecutor(_READERS, thread_name_prefix="voc") as pool:
        for one, (size, found) in zip(listed, pool.map(load, listed), strict=True):
            if isinstance(size, str):
                errors.add(one.location, f"{one.folder / 'JPEGImages' / one.stem}: {size}")
            else:
                yield one, AnnotatedImage(one.stem, files[one.folder][one.stem], *size), found


def _size(path: str | None) -> tuple[int, int] | str:
    """Return height and width of an image, or the reason why it cannot be read."""
    if path is None:
        return "no such image"
    try:
        return image_size(path)
    except (OSError, ImageError) as error:
        return describe_error(error)


def _annotation(one: ListedImage) -> list[Fields] | XmlError:
    """Return the objects of an image, or the error."""
    try:
        return read_xml(one.label.read_bytes())
    except XmlError as error:
        return error
    except OSError as error:
        return XmlError(0, describe_error(error))
