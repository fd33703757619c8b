"""ImageNet as distributed: the validation set, and subsets of the training set.

The training folders are read by `SampleIndex.from_folder`. Lists of `path label` lines, such as
ImageNet's meta/train.txt and Places205's csv files, are read by `SampleIndex.from_list`.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pipelines.datasets.files import IndexFormatError, read_lines, require_folder
from pipelines.datasets.index import SampleIndex

_VAL_NAME = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")
_SYNSET = re.compile(r"n\d{8}")


def imagenet_val(folder: str | os.PathLike[str], *, truth: str | os.PathLike[str]) -> SampleIndex:
    """Index the validation images in one flat folder, ILSVRC2012_val_*.JPEG, as in the archive.

    Args:
        folder: Folder of the images.
        truth: A text file with one synset (n01440764) per line and image, or the folder of the
            development kit, ILSVRC2012_devkit_t12. Its meta.mat maps ids to synsets.

    Returns:
        Images in the order of their numbers. Classes are the sorted synsets, as with training
        folders.

    Raises:
        FileNotFoundError: A file or folder is missing.
        IndexFormatError: A line is not a label, or images and labels do not match.
    """
    base, source = require_folder(folder), Path(truth)
    if source.is_dir():
        by_id = _devkit_synsets(source / "data" / "meta.mat")
        source = source / "data" / "ILSVRC2012_validation_ground_truth.txt"
        synsets = [
            by_id.get(line) or _refuse(location, line) for location, line in read_lines(source)
        ]
        classes = sorted(by_id.values())
    else:
        synsets = [
            line if _SYNSET.fullmatch(line) else _refuse(location, line)
            for location, line in read_lines(source)
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
    """Select the training images named in a list, such as SimCLR's 1 % and 10 % subsets.

    Args:
        listing: Text file with one file name per line, without folder: `n01440764_10026.JPEG`.
        index: The training images.

    Returns:
        The images in the order of the list. Class ids stay those of `index`.

    Raises:
        FileNotFoundError: There is no such list.
        IndexFormatError: A name is listed twice, or does not match exactly one image.
    """
    wanted: dict[str, int] = {}
    for location, line in read_lines(Path(listing)):
        if line in wanted:
            raise IndexFormatError(f"{location}: {line!r} is listed twice")
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
    for location, line in read_lines(Path(listing)):
        if chosen[wanted[line]] < 0:
            raise IndexFormatError(f"{location}: no image {line!r} below {str(index.root)!r}")
    names = (index.name(int(i)) for i in chosen)
    return SampleIndex.from_names(index.root, names, index.labels[chosen], index.classes)


def _refuse(location: str, line: str) -> NoReturn:
    raise IndexFormatError(f"{location}: expected a synset or its id, found {line[:200]!r}")


def _devkit_synsets(source: Path) -> dict[str, str]:
    """Read synsets by ILSVRC2012_ID (as text). The ids are not in the order of the synsets."""
    if not source.is_file():
        raise FileNotFoundError(f"{str(source)!r} does not exist")
    scipy_io: Any = importlib.import_module("scipy.io")
    try:
        rows = np.atleast_1d(scipy_io.loadmat(source, squeeze_me=True)["synsets"])
        # The first thousand rows are classes. The rest are groups of synsets, which have children.
        return {
            str(int(row["ILSVRC2012_ID"])): str(row["WNID"])
            for row in rows
            if not row["num_children"]
        }
    except (KeyError, ValueError, TypeError) as error:
        raise IndexFormatError(f"{source}: not a table of synsets: {error}") from error
