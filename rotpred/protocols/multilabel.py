"""Multi-label tables: 1 present, -1 absent, 0 difficult (VOC)."""

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


def read_labels(path: str, *, total: int, root: str | None = None) -> Labels:
    """Read the labels of a data set: int8 (total, C).

    Args:
        path: An .npy file with a row for every sample of the data set, or voc2007:SPLIT.
        total: Number of samples of the data set.
        root: The folder VOC2007, for voc2007:SPLIT.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a label table, or is for another data set.
    """
    kind, _, split = path.partition(":")
    if kind == "voc2007" and split:
        if not root:
            raise ValueError(f"labels {path} need the root of the data: the folder VOC2007")
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
            f"{path} has {len(table):,} rows, but the data have {total:,} samples: is it for "
            "another data set or split?"
        )
    return table


def read_label_tables(
    paths: Sequence[str | None], data: Sequence[Loader]
) -> tuple[list[Labels | None], int]:
    """Read the label tables of training and test data, and the number of classes they share.

    Args:
        paths: One per data set, as for `read_labels`; None to use the data's class ids.
        data: Training and test data.

    Returns:
        int8 (samples, C) per data set, None without a path; and the number of classes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The tables do not fit the data or each other.
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
                f"{part.spec.data} has samples without a label, and no label file was given"
            )
        if table is None and high >= widths[0]:
            raise ValueError(
                f"{part.spec.data} has label {high}, but the other data have {widths[0]} classes"
            )
    return tables, widths[0]


def labels_of(features: Features, table: Labels | None, classes: int) -> Labels:
    """Return the labels of the samples that have features: int8 (N, classes).

    Args:
        features: Selects the rows of the table.
        table: From `read_label_tables`; None for class ids, each class against the rest.
        classes: Number of classes.
    """
    if table is None:
        return np.where(features.labels[:, None] == np.arange(classes), 1, -1).astype(np.int8)
    chosen: Labels = table[features.indices]
    return chosen


def check_counts(
    labels: Labels, names: Sequence[str], what: str, *, positive: int, negative: int
) -> None:
    """Check that every class has enough samples, before any SVM is trained.

    Args:
        labels: int8 (N, C).
        names: Names of the C classes.
        what: Name of these samples in the message.
        positive: Samples with label 1 that every class needs.
        negative: Samples with label -1 that every class needs.

    Raises:
        ValueError: A class has fewer; the message names it.
    """
    for sign, kind, needed in ((1, "positive", positive), (-1, "negative", negative)):
        counts = (labels == sign).sum(axis=0)
        for name, count in zip(names, counts.tolist(), strict=True):
            if count < needed:
                raise ValueError(
                    f"class {name} has {count} {kind} samples in the {what}, but needs at least "
                    f"{needed}"
                )
