"""Data sets in the layouts in which they are handed out, as lists of files with labels.

ImageNet's training folders are `SampleIndex.from_folder`; lists of `path label` lines, which are
ImageNet's meta/train.txt and Places205's csv files as well, are `SampleIndex.from_list`.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pipelines.datasets.files import IndexFormatError, _folder, _lines
from pipelines.datasets.index import SampleIndex

_VAL_NAME = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")
_SYNSET = re.compile(r"n\d{8}")


def imagenet_val(folder: str | os.PathLike[str], *, truth: str | os.PathLike[str]) -> SampleIndex:
    """ImageNet's validation images as the archive unpacks: one folder, ILSVRC2012_val_*.JPEG.

    Args:
        folder: Where the images are.
        truth: A text file with the synset (n01440764) of one image a line, or the folder of the
            development kit, ILSVRC2012_devkit_t12, whose ids its meta.mat explains.

    Returns:
        Images by number; classes are the synsets in sorted order, as training folders have them.

    Raises:
        FileNotFoundError: A file or folder is missing.
        IndexFormatError: A line is no label, or images and lines do not go together.
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
        index: The training images.

    Returns:
        The images in the list's order; class ids stay those of `index`.

    Raises:
        FileNotFoundError: There is no such list.
        IndexFormatError: A name comes twice, or there is not exactly one such image.
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
            raise IndexFormatError(f"{place}: no image {line!r} below {str(index.root)!r}")
    return index.subset(chosen)


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
