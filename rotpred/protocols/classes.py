"""Number of classes, and the check that training and test data agree on them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rotpred.training.loader_interface import LabelledLoader


def number_of_classes(train: LabelledLoader, val: LabelledLoader) -> int:
    """Return the number of classes. Training and test data must have the same, in the same order.

    Data with ids only match any names, if there are enough of them.

    Raises:
        ValueError: A sample has no label, or the classes differ.
    """
    for part in (train, val):
        if part.label_range[0] < 0:
            raise ValueError(f"{part.spec.data} has samples without a label")
    for one, other in ((train, val), (val, train)):
        names, high = other.classes, one.label_range[1]
        # Folders 0, 1, 10, 2 are sorted as text: such names are not ids.
        numbers = not _only_ids(names) and all(name.isdecimal() for name in names)
        if _only_ids(one.classes) and not numbers:
            if not _only_ids(names) and high >= len(names):
                raise ValueError(
                    f"{one.spec.data} has label {high}, but {other.spec.data} has {len(names)} "
                    "classes, counted from 0"
                )
            return max(high + 1, other.label_range[1] + 1, len(one.classes), len(names))
    if train.classes != val.classes:
        pairs = enumerate(itertools.zip_longest(train.classes, val.classes, fillvalue="missing"))
        i, (ours, theirs) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        raise ValueError(
            f"{train.spec.data} and {val.spec.data} have different classes ({len(train.classes)} "
            f"and {len(val.classes)}): number {i} is {ours} in the first, {theirs} in the second"
        )
    return len(train.classes)


def _only_ids(names: Sequence[str]) -> bool:
    """Return whether there are no names (stock FFCV's betons), or ids as text (a list of files)."""
    return list(names) == [str(i) for i in range(len(names))]
