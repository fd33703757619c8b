"""Data sets in the layouts in which they are handed out, as lists of files with labels.

ImageNet's training folders are `SampleIndex.from_folder`; lists of `path label` lines, which are
ImageNet's meta/train.txt and Places205's csv files as well, are `SampleIndex.from_list`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from pipelines.datasets.index import IndexFormatError, SampleIndex

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
"""VOC2007's classes, in the order of their files' names."""

_VAL_NAME = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")
_SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True, eq=False)
class MultiLabelled:
    """Pictures that each have any number of classes."""

    images: SampleIndex
    """The pictures; their own labels are -1."""
    targets: npt.NDArray[np.int8]
    """(N, C): 1 present, -1 absent, 0 present but difficult."""
    classes: tuple[str, ...]
    """(C,): names of the columns."""


def imagenet_val(folder: str | os.PathLike[str], *, truth: str | os.PathLike[str]) -> SampleIndex:
    """ImageNet's validation pictures as the archive unpacks: one folder, ILSVRC2012_val_*.JPEG.

    Args:
        folder: Where the pictures are.
        truth: A text file with the synset (n01440764) of one picture a line, or the folder of the
            development kit, ILSVRC2012_devkit_t12, whose ids its meta.mat explains.

    Returns:
        Pictures by number; classes are the synsets in sorted order, as training folders have them.

    Raises:
        FileNotFoundError: A file or folder is missing.
        IndexFormatError: A line is no label, or pictures and lines do not go together.
    """
    base, source = _folder(folder), Path(truth)
    if source.is_dir():
        by_id = _devkit_synsets(source / "data" / "meta.mat")
        source = source / "data" / "ILSVRC2012_validation_ground_truth.txt"
        synsets = [by_id.get(line) or _refuse(place, line) for place, line in _lines(source)]
        classes = sorted(by_id.values())
    else:
        synsets = [
            line if _SYNSET.fullmatch(line) else _refuse(place, line)
            for place, line in _lines(source)
        ]
        classes = sorted(set(synsets))
    found = sorted(name for name in os.listdir(base) if _VAL_NAME.fullmatch(name))
    for number, name in enumerate(found, 1):
        expected = f"ILSVRC2012_val_{number:08}.JPEG"
        if name != expected:
            raise IndexFormatError(f"{base}: expected {expected}, found {name}")
    if len(found) != len(synsets):
        raise IndexFormatError(f"{source}: {len(synsets)} labels for {len(found)} files in {base}")
    ids = {synset: i for i, synset in enumerate(classes)}
    return SampleIndex.from_names(base, found, [ids[s] for s in synsets], classes)


def imagenet_subset(listing: str | os.PathLike[str], index: SampleIndex) -> SampleIndex:
    """The part of ImageNet that a list of file names asks for, such as SimCLR's 1 % and 10 %.

    Args:
        listing: One name a line without its folder, as in `n01440764_10026.JPEG`.
        index: The training pictures.

    Returns:
        The pictures in the list's order; class ids stay those of `index`.

    Raises:
        FileNotFoundError: There is no such list.
        IndexFormatError: A name comes twice, or there is not exactly one such picture.
    """
    wanted: dict[str, int] = {}
    for place, line in _lines(Path(listing)):
        if line in wanted:
            raise IndexFormatError(f"{place}: {line!r} comes twice")
        wanted[line] = len(wanted)
    chosen = np.full(len(wanted), -1, np.int64)
    for i in range(len(index)):
        row = wanted.get(os.path.basename(index.name(i)))
        if row is None:
            continue
        if chosen[row] >= 0:
            two = f"{index.name(int(chosen[row]))!r} and {index.name(i)!r}"
            raise IndexFormatError(f"{listing}: {two} have the same name")
        chosen[row] = i
    for place, line in _lines(Path(listing)):
        if chosen[wanted[line]] < 0:
            raise IndexFormatError(f"{place}: no picture {line!r} below {str(index.root)!r}")
    return index.subset(chosen)


def inaturalist(
    annotations: str | os.PathLike[str], *, root: str | os.PathLike[str]
) -> SampleIndex:
    """An iNaturalist competition's pictures, by its COCO-style train2018.json or val2018.json.

    Args:
        annotations: The JSON file.
        root: The folder that holds train_val2018, or that folder: the names in the file begin with
            it, and archives have been unpacked into a folder of that name as well.

    Raises:
        FileNotFoundError: A file, folder or picture is missing.
        IndexFormatError: The file lacks a part, or a picture has not exactly one category.
    """
    source, base = Path(annotations), _folder(root)
    content = _json(source)
    try:
        names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        categories = {int(one["id"]): str(one["name"]) for one in content["categories"]}
        pairs = [(int(a["image_id"]), int(a["category_id"])) for a in content["annotations"]]
    except (KeyError, TypeError, ValueError) as error:
        what = f"expected images, annotations and categories: {type(error).__name__} {error}"
        raise IndexFormatError(f"{source}: {what}") from error
    labels = dict(pairs)
    if not names or len(pairs) != len(labels) or labels.keys() != names.keys():
        odd = sorted(labels.keys() ^ names.keys())[:1]
        where = f"image id {odd[0]}" if odd else f"{len(pairs)} annotations, {len(names)} images"
        raise IndexFormatError(f"{source}: expected one annotation an image: {where}")
    if sorted(categories) != list(range(len(categories))):
        raise IndexFormatError(f"{source}: category ids are not 0..{len(categories) - 1}")
    unknown = next((image for image, label in labels.items() if label not in categories), None)
    if unknown is not None:
        raise IndexFormatError(f"{source}: image id {unknown}: no category {labels[unknown]}")
    first = next(iter(names.values()))
    top, _, rest = first.partition("/")
    if (base / first).is_file():
        pass
    elif (base / top / first).is_file():
        base = base / top
    elif rest and (base / rest).is_file():
        if any(not name.startswith(f"{top}/") for name in names.values()):
            raise IndexFormatError(f"{source}: not all file names begin with {top!r}")
        names = {image: name[len(top) + 1 :] for image, name in names.items()}
    else:
        raise FileNotFoundError(f"{source}: {first!r} is not below {str(base)!r}")
    ids = [labels[image] for image in names]
    classes = [categories[i] for i in range(len(categories))]
    index = SampleIndex.from_names(base, names.values(), ids, classes)
    numbers = list(names)
    index.require_files(lambda i: f"{source}: image id {numbers[i]}")
    return index


def voc2007(root: str | os.PathLike[str], *, split: str) -> MultiLabelled:
    """VOC2007's classification task.

    Args:
        root: The folder VOCdevkit/VOC2007.
        split: train, val, trainval or test.

    Raises:
        FileNotFoundError: A file, folder or picture is missing.
        IndexFormatError: A line is wrong, or the classes' files name different pictures.
    """
    base = _folder(root)
    columns: list[list[int]] = []
    pictures: list[str] = []
    places: list[str] = []
    for name in VOC_CLASSES:
        source = base / "ImageSets" / "Main" / f"{name}_{split}.txt"
        column: list[int] = []
        for row, (place, line) in enumerate(_lines(source)):
            picture, _, value = line.partition(" ")
            if value.strip() not in ("-1", "0", "1"):
                raise IndexFormatError(f"{place}: expected `picture -1|0|1`, found {line[:200]!r}")
            if not columns:
                pictures.append(picture)
                places.append(place)
            elif row >= len(pictures) or pictures[row] != picture:
                raise IndexFormatError(f"{place}: {picture!r} is not the picture of other classes")
            column.append(int(value))
        if len(column) != len(pictures):
            raise IndexFormatError(f"{source}: {len(column)} lines, expected {len(pictures)}")
        columns.append(column)
    names = [f"JPEGImages/{picture}.jpg" for picture in pictures]
    images = SampleIndex.from_names(base, names, [-1] * len(names), ())
    images.require_files(places.__getitem__)
    return MultiLabelled(images, np.array(columns, np.int8).T.copy(), VOC_CLASSES)


def _lines(source: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not empty, each with its place."""
    if not source.is_file():
        raise FileNotFoundError(f"{str(source)!r} does not exist")
    empty = True
    with source.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = raw.decode().strip()
            except UnicodeDecodeError as error:
                raise IndexFormatError(f"{source}:{number}: not UTF-8 text") from error
            if line:
                empty = False
                yield f"{source}:{number}", line
    if empty:
        raise IndexFormatError(f"{source}: is empty")


def _refuse(place: str, line: str) -> NoReturn:
    raise IndexFormatError(f"{place}: expected a synset or its id, found {line[:200]!r}")


def _devkit_synsets(source: Path) -> dict[str, str]:
    """Synsets by ILSVRC2012_ID, as text; the ids are not in the order of synsets."""
    if not source.is_file():
        raise FileNotFoundError(f"{str(source)!r} does not exist")
    scipy_io: Any = importlib.import_module("scipy.io")
    try:
        rows = np.atleast_1d(scipy_io.loadmat(source, squeeze_me=True)["synsets"])
        # Groups of synsets, which have children, follow the thousand that are labels.
        return {
            str(int(row["ILSVRC2012_ID"])): str(row["WNID"])
            for row in rows
            if not row["num_children"]
        }
    except (KeyError, ValueError, TypeError) as error:
        raise IndexFormatError(f"{source}: no table of synsets: {error}") from error


def _json(source: Path) -> Any:
    if not source.is_file():
        raise FileNotFoundError(f"{str(source)!r} does not exist")
    try:
        return json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IndexFormatError(f"{source}: no JSON: {error}") from error


def _folder(path: str | os.PathLike[str]) -> Path:
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{str(path)!r} is not a folder")
    return Path(path)
