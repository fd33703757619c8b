"""Number of classes, and the check that training and test data agree on them."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from rotpred.training.loader_interface import LabelledLoader


class LabelledData(NamedTuple):
    """Classes and label range of a data set."""

    data: str
    """Name of the data set in messages."""
    names: tuple[str, ...]
    """Names by id. Empty if unknown (stock FFCV's betons); a list of files has ids as text."""
    low: int
    """Smallest label; -1 for a sample without one."""
    high: int
    """Largest label."""

    @property
    def unnamed(self) -> bool:
        """Whether only the ids are known."""
        return self.names == tuple(map(str, range(len(self.names))))


def number_of_classes(train: LabelledLoader, val: LabelledLoader) -> int:
    """Return `shared_classes` of two loaders; raises as it does."""
    return shared_classes(
        *(LabelledData(part.spec.data, part.classes, *part.label_range) for part in (train, val))
    )


def shared_classes(train: LabelledData, val: LabelledData) -> int:
    """Return the number of classes. Training and test data must have the same, in the same order.

    Data with ids only match any names, if there are enough of them.

    Raises:
        ValueError: A sample has no label, or the classes differ.
    """
    for part in (train, val):
        if part.low < 0:
            raise ValueError(f"{part.data} has samples without a label")
    for one, other in ((train, val), (val, train)):
        # Folders 0, 1, 10, 2 are sorted as text: such names are not ids.
        numbers = not other.unnamed and all(name.isdecimal() for name in other.names)
        if one.unnamed and not numbers:
            if not other.unnamed and one.high >= len(other.names):
                raise ValueError(
                    f"{one.data} has label {one.high}, but {other.data} has "
                    f"{len(other.names)} classes, counted from 0"
                )
            return max(one.high + 1, other.high + 1, len(one.names), len(other.names))
    if train.names != val.names:
        pairs = enumerate(itertools.zip_longest(train.names, val.names, fillvalue="missing"))
        i, (ours, theirs) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        raise ValueError(
            f"{train.data} and {val.data} have different classes ({len(train.names)} and "
            f"{len(val.names)}): number {i} is {ours} in the first, {theirs} in the second"
        )
    return len(train.names)
