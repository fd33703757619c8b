"""Labels of images that may show several classes: 1 present, -1 absent, 0 difficult (VOC)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.datasets.voc_classification import voc2007
from pipelines.loader import Loader
from rotpred.features.base import Features
from rotpred.protocols.classes import number_of_classes

Labels = npt.NDArray[np.int8]


def read_labels(path: str, *, total: int, root: str = "") -> Labels:
    """The labels of a data set: int8 (total, C).

    Args:
        path: .npy with a row for every sample of the data set, or voc2007:SPLIT.
        total: samples of the data set.
        root: the folder VOC2007, for voc2007:SPLIT.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or labels of another data set.
    """
    kind, _, split = path.partition(":")
    if kind == "voc2007" and split:
        if not root:
            raise ValueError(f"labels {path} need the data's root: the folder VOC2007")
        table = voc2007(root, split=split).targets
    else:
        try:
            with Path(path).open("rb") as file:
                table = np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path} is not an .npy file of int8 (N, C): {error}") from error
    if table.ndim != 2 or table.dtype != np.int8 or not np.isin(table, (-1, 0, 1)).all():
        raise ValueError(f"{path}: expected int8 (N, C) of -1, 0 and 1")
    if len(table) != total:
        raise ValueError(
            f"{path} has {len(table):,} rows, but the data have {total:,} samples: is it of "
            "another data set, or another split of it?"
        )
    return table


def read_tables(paths: Sequence[str], data: Sequence[Loader]) -> tuple[list[Labels | None], int]:
    """The labels of training and test data, and the number of classes that they share.

    Args:
        paths: as for `read_labels`, of each; empty where the data have one class id a sample.
        data: the two.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: they do not fit the data or one another.
    """
    tables = [
        read_labels(path, total=part.total, root=part.spec.root) if path else None
        for path, part in zip(paths, data, strict=True)
    ]
    widths = [table.shape[1] for table in tables if table is not None]
    if not widths:
        return tables, number_of_classes(*data)
    if len(set(widths)) > 1:
        raise ValueError(f"training data have {widths[0]} classes, test data {widths[1]}")
    for table, part in zip(tables, data, strict=True):
        low, high = part.label_range
        if table is None and low < 0:
            raise ValueError(
                f"{part.spec.data} has samples without a label, and no file of labels was named"
            )
        if table is None and high >= widths[0]:
            raise ValueError(
                f"{part.spec.data} has label {high}, the other data {widths[0]} classes"
            )
    return tables, widths[0]


def labels_of(features: Features, table: Labels | None, classes: int) -> Labels:
    """The labels of the samples that have features: int8 (N, classes).

    Args:
        features: chooses the rows.
        table: of `read_tables`; None for class ids, each class against the rest.
        classes: number of them.
    """
    if table is None:
        return np.where(features.labels[:, None] == np.arange(classes), 1, -1).astype(np.int8)
    chosen: Labels = table[features.indices]
    return chosen


def check_counts(
    labels: Labels, names: Sequence[str], what: str, *, positive: int, negative: int
) -> None:
    """Refuse labels with too few samples of a class: before the SVMs, not in the midst of them.

    Args:
        labels: (N, C).
        names: of the C classes.
        what: these samples are, for the message.
        positive: samples with 1 that every class needs.
        negative: samples with -1.

    Raises:
        ValueError: a class has fewer; the message names it.
    """
    for sign, kind, needed in ((1, "positive", positive), (-1, "negative", negative)):
        counts = (labels == sign).sum(axis=0)
        for name, count in zip(names, counts.tolist(), strict=True):
            if count < needed:
                raise ValueError(
                    f"class {name} has {count} {kind} samples in the {what}, which must be "
                    f"{needed} at least"
                )
