"""Building blocks of the model page's tables: rows, their metrics and published numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rotpred.report.sources import PublishedSource


@dataclass(frozen=True)
class Cell:
    """A row of a table."""

    name: str
    metrics: tuple[str, ...]
    """Metrics of results.json that fill it; the highest result is shown."""
    published: Mapping[PublishedSource, str] = field(default_factory=dict)
    """Published number by source, as it was printed."""
    where: Mapping[str, float] = field(default_factory=dict)
    """Further fields and values that a row of results.json must have."""


@dataclass(frozen=True)
class BenchmarkTable:
    """The table of one benchmark."""

    title: str
    recipes: tuple[str, ...]
    """Names of the recipes that fill it."""
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()
    processes: int = 1
    """Number of processes with which the recipes were published."""
    options: tuple[str, ...] = ()
    """Options of the evaluation commands, besides the weights."""

    @property
    def sources(self) -> tuple[PublishedSource, ...]:
        """Sources of published numbers, one per column, in order of first use."""
        return tuple(dict.fromkeys(source for cell in self.cells for source in cell.published))


def cells(
    names: Iterable[str],
    metrics: Iterable[str],
    published: Mapping[PublishedSource, str],
    where: Mapping[str, float] | None = None,
) -> tuple[Cell, ...]:
    """Make consecutive rows, each filled by one metric.

    Args:
        names: Names of the rows.
        metrics: The metric of each row.
        published: By source: one number per row, separated by spaces; `-` if there is none.
        where: As in `Cell`, for all rows.

    Raises:
        ValueError: A source does not have one number per row.
    """
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
