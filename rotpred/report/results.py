"""Reading finished run folders: results with their weights, commands, figures."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from pipelines.storage import read_json
from rotpred.records.folder import DONE, read_results
from rotpred.records.former_names import translate_names, translate_option

TRAINED, RANDOM = "trained", "random"
KINDS = {TRAINED: "FILE", RANDOM: "random", "supervised": "imagenet"}
"""Kinds of weights, and how --weights and a row of results.json name them."""

SETTINGS = ("fraction", "lr", "head_lr_mult")
"""Fields that distinguish rows of one metric."""


@dataclass(eq=False)
class FinishedRun:
    """A finished run, read from its folder."""

    path: Path
    """Run folder."""
    name: str
    """Name shown on the page."""
    group: str
    """Name of the folder; kept copies of several runs share one."""
    recipe: Mapping[str, object]
    """recipe.json; empty if it was not kept."""
    env: Mapping[str, object]
    """env.json; empty if it was not kept."""
    figures: Sequence[Path]
    """PNG files."""
    results: list[Result] = field(default_factory=list)
    """Rows of results.json, at least one."""

    @property
    def backbone(self) -> str:
        """Name of the backbone, "" if unknown."""
        return str(self.recipe.get("backbone", ""))

    @property
    def processes(self) -> int | None:
        """Number of processes, None if unknown."""
        world = self.env.get("world")
        return world if isinstance(world, int) else None

    @property
    def revision(self) -> str:
        """Git revision of the code, "unknown" if not recorded."""
        git = self.env.get("git")
        if not isinstance(git, dict):
            return "unknown"
        return str(git.get("revision", ""))[:12] + (" + changes" if git.get("dirty") else "")

    @property
    def command(self) -> str:
        """Command as typed, options renamed to the current ones; else made from the recipe."""
        command = self.env.get("command")
        words = [str(word) for word in command] if isinstance(command, list) else []
        script = Path(words[0]).name if words else ""
        if script not in ("pretrain.py", "evaluate.py"):
            weights = self.recipe.get("weights") or next((r.weights for r in self.results), "")
            script = "evaluate.py" if weights else "pretrain.py"
            words = ["", str(self.results[0].recipe)]
            words += ["--weights", str(weights)] if weights else []
        start = ["torchrun", "--standalone", "--nproc-per-node", str(self.processes or 1)]
        val = self.recipe.get("val")
        spec = val if isinstance(val, dict) else {}
        options = [translate_option(word, spec) for word in words[1:]]
        return shlex.join([*start, f"scripts/{script}", *options])


@dataclass(frozen=True, eq=False)
class Result:
    """A row of results.json."""

    run: FinishedRun
    recipe: str
    metric: str
    value: float
    unit: str
    n: int
    kind: str | None
    """Kind of the weights, one of `KINDS`; None for a pretraining run's own result."""
    row: Mapping[str, object]

    @property
    def weights(self) -> str:
        """Name of the weights file, or "random"; "" for a pretraining run."""
        return str(self.row.get("weights", ""))

    @property
    def sha(self) -> str:
        """SHA-256 of the weights, "" for random ones."""
        return str(self.row.get("checkpoint_sha256") or "")

    @property
    def label(self) -> str:
        """The metric and the row's settings."""
        # Rows of a grid have their settings in the metric: top1/lr=0.1,head=10. The best of a grid
        # gets no settings: weights may differ in their best setting, but are compared in one row.
        names: tuple[str, ...] = SETTINGS
        if "=" in self.metric:
            names = ()
        elif "chosen_from" in self.row:
            names = SETTINGS[:1]
        return ", ".join((self.metric, *(f"{n} {self.row[n]}" for n in names if n in self.row)))


def read_runs(path: Path) -> list[FinishedRun]:
    """Read a run folder, or a folder of kept copies (NAME.results.json, NAME.env.json, ...).

    Raises:
        ValueError: The folder is neither, the run is unfinished, or a file is damaged.
    """
    name = path.resolve().name
    if (path / "results.json").is_file():
        run = _read(path, name, "", sorted((path / "figures").glob("*.png")))
        # Up to 0.2 a grid search had no DONE file; its last row names the best point.
        ended = run.recipe.get("grid") is True and "chosen_from" in run.results[-1].row
        if not ended and not (path / DONE).is_file():
            raise ValueError(f"{path} is unfinished: it has no {DONE}")
        return [run]
    kept = sorted(path.glob("*.results.json"))
    if not kept:
        raise ValueError(f"{path} is not a run folder: it has no results.json")
    runs = []
    for i, file in enumerate(kept):
        prefix = file.name.removesuffix("results.json")
        figures = [] if i else sorted(path.glob("*.png"))
        runs.append(_read(path, f"{name}/{prefix[:-1]}", prefix, figures))
    return runs


def _read(path: Path, name: str, prefix: str, figures: Sequence[Path]) -> FinishedRun:
    for figure in figures:
        try:
            with Image.open(figure, formats=("PNG",)) as image:
                image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{figure} is not a complete PNG file ({error})") from error
    run = FinishedRun(
        path=path,
        name=name,
        group=path.resolve().name,
        recipe=_object(path / f"{prefix}recipe.json"),
        env=_object(path / f"{prefix}env.json"),
        figures=figures,
    )
    file = path / f"{prefix}results.json"
    run.results += [_result(run, row, file) for row in read_results(file)]
    if not run.results:
        raise ValueError(f"{file} is empty")
    return run


def _object(path: Path) -> dict[str, object]:
    found: dict[str, object] = translate_names(read_json(path, dict)) if path.exists() else {}
    return found


def _result(run: FinishedRun, row: dict[str, object], file: Path) -> Result:
    texts = [row.get(key) for key in ("recipe", "metric", "unit")]
    value, n, weights = row.get("value"), row.get("n"), row.get("weights")
    if (
        not all(isinstance(text, str) for text in texts)
        or isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not isinstance(n, int)
    ):
        raise ValueError(f"{file}: {row} is not a result")
    recipe, metric, unit = (str(text) for text in texts)
    kind: str | None = None
    if row.get("benchmark") != "rotation":
        if not isinstance(weights, str) or not weights:
            raise ValueError(f"{file}: {recipe} {metric} does not name its weights")
        kind = next((kind for kind, name in KINDS.items() if name == weights), TRAINED)
    return Result(run, recipe, metric, float(value), unit, n, kind, row)
