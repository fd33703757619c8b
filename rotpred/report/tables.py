"""What tables of the model page are made of: rows, results that fill them, numbers of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PublishedSource:
    """Where a column of published numbers comes from."""

    name: str
    """Head of the column."""
    place: str
    """Project and file, network and schedule."""


@dataclass(frozen=True)
class Cell:
    """One row of a table."""

    name: str
    metrics: tuple[str, ...]
    """Metrics of results.json that fill it; of several results, the highest."""
    published: Mapping[PublishedSource, str] = field(default_factory=dict)
    where: Mapping[str, float] = field(default_factory=dict)
    """Further fields that a row of results.json must have, with these values."""


@dataclass(frozen=True)
class Table:
    """One benchmark."""

    title: str
    recipes: tuple[str, ...]
    """Names of the recipes that fill it."""
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()
    processes: int = 1
    """Of the recipes, as they were published."""
    options: tuple[str, ...] = ()
    """Of their commands, besides the weights."""

    @property
    def sources(self) -> tuple[PublishedSource, ...]:
        """The columns of published numbers, in the order of their first number."""
        return tuple(dict.fromkeys(source for cell in self.cells for source in cell.published))


def cells(
    names: Iterable[str],
    metrics: Iterable[str],
    published: Mapping[PublishedSource, str],
    where: Mapping[str, float] | None = None,
) -> tuple[Cell, ...]:
    """Cells in a row; a source's numbers are separated by spaces, `-` where it has none."""
    names = list(names)
    columns = {source: numbers.split() for source, numbers in published.items()}
    if any(len(numbers) != len(names) for numbers in columns.values()):
        raise ValueError(f"expected {len(names)} numbers from each source for {names}")
    return tuple(
        Cell(
            name,
            (metric,),
            {source: row[i] for source, row in columns.items() if row[i] != "-"},
            where or {},
        )
        for i, (name, metric) in enumerate(zip(names, metrics, strict=True))
    )
