"""Building blocks of the model page's tables: sources of published numbers, rows, metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PublishedSource:
    """Source of a column of published numbers."""

    name: str
    """Title of the column."""
    place: str
    """Project and file, network and schedule."""


_ZOO = "OpenSelfSup, docs/MODEL_ZOO.md, ResNet-50"
MM = PublishedSource(
    "mmselfsup",
    "mmselfsup, configs/selfsup/rotation_pred/README.md, ResNet-50, 70 epochs",
)
OSS = PublishedSource("OpenSelfSup", f"{_ZOO}, 70 epochs: the same recipe, its own checkpoint")
OSS_RANDOM = PublishedSource("OpenSelfSup, random", f"{_ZOO}, random weights")
OSS_SUPERVISED = PublishedSource("OpenSelfSup, supervised", f"{_ZOO}, supervised on ImageNet")
OSS_C4 = PublishedSource(
    "OpenSelfSup, C4 2x", f"{_ZOO}; another detector: Mask R-CNN C4, 2x schedule"
)
OSS_C4_RANDOM = PublishedSource(
    "OpenSelfSup, C4 2x, random", f"{_ZOO}, random weights; another detector"
)
OSS_C4_SUPERVISED = PublishedSource(
    "OpenSelfSup, C4 2x, supervised", f"{_ZOO}, supervised on ImageNet; another detector"
)
PAPER = PublishedSource(
    "paper", "Gidaris et al., ICLR 2018, as quoted by later texts (second hand)"
)
RERUN = PublishedSource(
    "rerun of the paper's code", "gidariss/FeatureLearningRotNet, issue 6: a user's report"
)

WARNING = (
    "mmselfsup's table mixes three checkpoints. SVM, low-shot, Feature1 to Feature5, detection and "
    "segmentation are unchanged since v0.5.0, whose loader (up to v0.6.0) fed BGR pixels with the "
    "mean and standard deviation of RGB. v0.7.0 corrected that and retrained (Places205, and kNN "
    "in v0.8.0). The AvgPool number 47.0 is of a third checkpoint, of 1.x (48.12 for that of "
    "February 2022, 44.35 for that of December 2021). Differences of half a point from it are not "
    "meaningful."
)
"""About inconsistencies among the published numbers; derived from the tags of mmselfsup."""


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
