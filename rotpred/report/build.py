"""Building the results page from run folders: every benchmark, trained beside random weights.

Results are matched to the tables of `published.TABLES` by recipe and metric. Equal folders give
equal pages: a page has no timestamp.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from rotpred.report import published
from rotpred.report.page import NOT_RUN, Block, Code, Grid, Heading, ImageBlock, Text
from rotpred.report.recipe_changes import recipe_changes
from rotpred.report.results import KINDS, RANDOM, SETTINGS, TRAINED, FinishedRun, Result
from rotpred.report.tables import WARNING, BenchmarkTable, Cell

TITLE = "Rotation prediction: results"
MARK = "†"
"""Marks results of a protocol that differs from the recipe's."""
NONE = "–"
"""Text of a cell without a published number or a difference."""


def page(
    runs: Sequence[FinishedRun], *, left_out: Sequence[str] = (), notes: Sequence[str] = ()
) -> list[Block]:
    """Build the page.

    Args:
        runs: Runs whose results and figures it shows.
        left_out: Names of run folders that could not be read; the page lists them.
        notes: Paragraphs about these runs, for the top of the page.

    Raises:
        ValueError: Two runs have the same result of the same kind of weights.
    """
    results = _collect(runs)
    blocks: list[Block] = [
        Heading(TITLE, 1),
        Text(
            "Numbers are percentages on the test data. Columns are trained weights, random weights "
            "in the same network, their difference (trained minus random), and published numbers. "
            f"“{NOT_RUN}”: no run has that result."
        ),
        Text(WARNING, warning=True),
    ]
    if left_out:
        blocks.append(Text(f"Left out as broken: {', '.join(left_out)}.", warning=True))
    blocks += [*map(Text, notes), *_pretext(runs)]
    known = {name for table in published.TABLES for name in table.recipes}
    others = dict.fromkeys(result.recipe for result in results if result.recipe not in known)
    tables = [
        *published.TABLES,
        *(BenchmarkTable(published.TITLES.get(name, name), (name,), ()) for name in others),
    ]
    filled = [(t, [r for r in results if r.recipe in t.recipes]) for t in tables]
    # Tables with results come first, otherwise in their own order.
    for table, part in sorted(filled, key=lambda pair: not pair[1]):
        blocks += _table(table, part)
    used = dict.fromkeys(source for table in published.TABLES for source in table.sources)
    blocks += [
        Heading("Sources of the published numbers", 2),
        Grid(("column", "source"), tuple((source.name, source.place) for source in used)),
        Heading("Other published numbers", 2),
        Text("Of other networks, or of layers that the source does not name."),
        Grid(("what", "number", "source"), published.OTHERS),
        *_figures(runs),
        *_provenance(runs),
    ]
    return blocks


def _collect(runs: Sequence[FinishedRun]) -> list[Result]:
    """Return all results of evaluations; raise ValueError for duplicates."""
    found: dict[tuple[object, ...], Result] = {}
    for result in (result for run in runs for result in run.results if result.kind is not None):
        key = (result.recipe, result.label, result.kind)
        if key in found:
            raise ValueError(
                f"{found[key].run.path} and {result.run.path} both have {result.recipe} "
                f"{result.label} of {result.kind} weights: leave one of them out"
            )
        found[key] = result
    return list(found.values())


def _table(table: BenchmarkTable, results: Sequence[Result]) -> list[Block]:
    """Return a benchmark: config, recipe changes, notes, table, other results, commands."""
    kinds = [
        kind for kind in KINDS if kind in (TRAINED, RANDOM) or any(r.kind == kind for r in results)
    ]
    blocks: list[Block] = [Heading(table.title, 2), _config(table, results)]
    blocks += _recipe_changes(dict.fromkeys(r.run for r in results))
    blocks += [Text(note) for note in table.notes]
    for kind in kinds:
        weights = {r.sha for r in results if r.kind == kind and r.sha}
        if len(weights) > 1:
            names = ", ".join(sha[:12] for sha in sorted(weights))
            blocks.append(Text(f"{kind} results of several weights files: {names}.", warning=True))
    used: set[Result] = set()
    rows = []
    for cell in table.cells:
        matching = [result for result in results if _fills(result, cell)]
        used.update(matching)
        best = {kind: _highest(matching, kind) for kind in kinds}
        theirs = [cell.published.get(source, NONE) for source in table.sources]
        rows.append((cell.name, *_ours(best, cell), *theirs))
    head = ("result", *kinds, "difference", *(source.name for source in table.sources))
    if rows:
        blocks.append(Grid(head, tuple(rows)))
    labels = dict.fromkeys(r.label for r in results if r not in used)
    rest = [
        (label, *_ours({k: _highest([r for r in results if r.label == label], k) for k in kinds}))
        for label in labels
    ]
    if rest:
        if rows:
            blocks.append(Text("Other results of these runs:"))
        blocks.append(Grid(("result", *kinds, "difference"), tuple(rest)))
    for protocol in dict.fromkeys(str(r.row["protocol"]) for r in results if "protocol" in r.row):
        blocks.append(Text(f"{MARK}: {protocol}."))
    return [*blocks, Code(_commands(table, results, kinds))]


def _fills(result: Result, cell: Cell) -> bool:
    """Return whether a result belongs to a cell."""
    return result.metric in cell.metrics and all(
        isinstance(field := result.row.get(name), int | float) and math.isclose(field, value)
        for name, value in cell.where.items()
    )


def _highest(results: Sequence[Result], kind: str) -> Result | None:
    return max((r for r in results if r.kind == kind), key=lambda r: r.value, default=None)


def _ours(best: Mapping[str, Result | None], cell: Cell | None = None) -> list[str]:
    """Return the text of our result for each kind of weights, and of the difference."""
    texts = [NOT_RUN if result is None else _text(result, cell) for result in best.values()]
    trained, random = best[TRAINED], best[RANDOM]
    if trained is None or random is None:
        return [*texts, NONE]
    return [*texts, f"{trained.value - random.value:+.2f}"]


def _text(result: Result, cell: Cell | None) -> str:
    """Return the value with two decimals, its deviation, the mark, and which of several it is."""
    text = f"{result.value:.2f}"
    if isinstance(deviation := result.row.get("deviation"), int | float):
        text += f" ± {deviation:.2f}"
    if result.unit != "%":
        text += f" {result.unit}"
    changes = recipe_changes(result.run.recipe, processes=result.run.processes)
    if changes or "protocol" in result.row:
        text += MARK
    chosen = []
    if cell is not None and len(cell.metrics) > 1:
        chosen.append(result.metric.partition("/")[2])
    if "=" not in result.metric:
        chosen += [f"{name} {result.row[name]}" for name in SETTINGS[1:] if name in result.row]
    if "chosen_from" in result.row:
        chosen.append(f"best of {result.row['chosen_from']}")
    return f"{text} ({', '.join(chosen)})" if chosen else text


def _config(table: BenchmarkTable, results: Sequence[Result]) -> Text:
    """Return recipes, backbones and numbers of test samples."""
    text = f"Config: {', '.join(table.recipes)}"
    if networks := sorted({r.run.backbone for r in results if r.run.backbone}):
        text += f"; {', '.join(networks)}"
    if counts := sorted({r.n for r in results}):
        text += f"; n = {' or '.join(f'{n:,}' for n in counts)}"
    return Text(f"{text}.")


def _recipe_changes(runs: Iterable[FinishedRun]) -> list[Block]:
    """Return one warning per set of recipe changes, with the runs that have it."""
    runs_by_changes: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        if changes := recipe_changes(run.recipe, processes=run.processes):
            runs_by_changes.setdefault(changes, []).append(run.name)
    return [
        Text(f"{MARK}: {', '.join(names)}: {'; '.join(changes)}.", warning=True)
        for changes, names in runs_by_changes.items()
    ]


def _commands(table: BenchmarkTable, results: Sequence[Result], kinds: Sequence[str]) -> str:
    """Return the commands of the runs, and those for the missing results."""
    lines = []
    for kind, recipe in itertools.product(kinds, table.recipes):
        runs = dict.fromkeys(r.run for r in results if r.kind == kind and r.recipe == recipe)
        for run in runs:
            lines += [f"# {kind}: {run.name}", run.command]
        if not runs:
            words = ["torchrun", "--standalone", "--nproc-per-node", str(table.processes)]
            words += ["scripts/evaluate.py", recipe, *table.options, "--weights", KINDS[kind]]
            lines += [f"# {kind}: {NOT_RUN}", " ".join(words)]
    return "\n".join(lines)


def _pretext(runs: Sequence[FinishedRun]) -> list[Block]:
    """Return the rotation accuracy of pretraining runs, one per row."""
    blocks: list[Block] = [Heading("Rotation prediction (accuracy on four views)", 2)]
    found = [r for run in runs for r in run.results if r.kind is None]
    if not found:
        return [*blocks, Text(f"Pretraining: {NOT_RUN}.")]
    rows = []
    for result in found:
        chance = result.row.get("chance")
        rows.append(
            (
                result.run.name,
                result.recipe,
                _text(result, None),
                f"{chance:.2f}" if isinstance(chance, int | float) else NONE,
                f"{result.n:,}",
                published.PRETEXT.get(result.recipe, NONE),
            )
        )
    head = ("run", "config", result.metric, "chance", "views", "published")
    commands = [f"# {run.name}\n{run.command}" for run in dict.fromkeys(r.run for r in found)]
    blocks += _recipe_changes(dict.fromkeys(r.run for r in found))
    return [*blocks, Grid(head, tuple(rows)), Code("\n".join(commands))]


def _figures(runs: Sequence[FinishedRun]) -> list[Block]:
    images: list[Block] = [
        ImageBlock(f"{run.group}: {path.stem}", path.read_bytes(), path)
        for run in runs
        for path in run.figures
    ]
    return [Heading("Figures of the runs", 2), *images] if images else []


def _provenance(runs: Sequence[FinishedRun]) -> list[Block]:
    """Return the weights, machine and versions of each run."""
    rows = []
    for run in runs:
        weights = {r.weights: r.sha for r in run.results}
        names = ", ".join(f"{name} {sha[:12]}".strip() for name, sha in weights.items())
        machine = [str(run.env[key]) for key in ("device", "cpu", "torch") if key in run.env]
        processes = "unknown" if run.processes is None else str(run.processes)
        rows.append((run.name, names, ", ".join(machine) or NONE, processes, run.revision))
    head = ("run", "weights (sha256)", "device, processor, torch", "processes", "revision")
    return [Heading("Runs", 2), Grid(head, tuple(rows))]
