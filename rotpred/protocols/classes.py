"""Check that training and test data have the same classes."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from pipelines.loader import Loader


class LabeledData(NamedTuple):
    """What a data set says of its classes."""

    data: str
    """How messages call it."""
    names: tuple[str, ...]
    """By id. Empty where there are none (stock FFCV's betons); a list of files has ids as text."""
    low: int
    """Smallest label of a sample; -1 stands for none."""
    high: int
    """Largest one."""

    @property
    def unnamed(self) -> bool:
        """Whether ids are all that is known."""
        return self.names == tuple(map(str, range(len(self.names))))


def number_of_classes(train: Loader, val: Loader) -> int:
    """`shared_classes` of what two loaders read."""
    return shared_classes(
        *(LabeledData(part.spec.data, part.classes, *part.label_range) for part in (train, val))
    )


def shared_classes(train: LabeledData, val: LabeledData) -> int:
    """Number of classes, which training and test data must share by name and order.

    Data that have ids only go with any names for them, as many as there are.

    Raises:
        ValueError: the data carry no labels, or not the same ones.
    """
    for part in (train, val):
        if part.low < 0:
            raise ValueError(f"{part.data} has samples without a label")
    for one, other in ((train, val), (val, train)):
        # Folders 0, 1, 10, 2 are in the order of text: those names are no ids.
        numbers = not other.unnamed and all(name.isdecimal() for name in other.names)
        if one.unnamed and not numbers:
            if not other.unnamed and one.high >= len(other.names):
                raise ValueError(
                    f"{one.data} has label {one.high}, but {other.data} has "
                    f"{len(other.names)} classes, which are counted from 0"
                )
            return max(one.high + 1, other.high + 1, len(one.names), len(other.names))
    if train.names != val.names:
        pairs = enumerate(itertools.zip_longest(train.names, val.names, fillvalue="nothing"))
        i, (ours, theirs) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        raise ValueError(
            f"{train.data} and {val.data} have different classes ({len(train.names)} and "
            f"{len(val.names)}): number {i} is {ours} and {theirs}"
        )
    return len(train.names)
