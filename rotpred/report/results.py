"""Run folders read back: results with the weights they belong to, commands, figures."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from rotpred.records.folder import DONE, read_results
from rotpred.records.former_names import translated

TRAINED, RANDOM, SUPERVISED = "trained", "random", "supervised"
KINDS = (TRAINED, RANDOM, SUPERVISED)
"""Of weights; a row of results.json names a file, "random", or "imagenet" for supervised ones."""

SETTINGS = ("fraction", "lr", "head_lr_mult")
"""Fields that tell rows of one metric apart."""


@dataclass(eq=False)
class FinishedRun:
    """One run."""

    path: Path
    """Its folder."""
    name: str
    """For people."""
    group: str
    """Name of the folder, which kept copies of several runs share."""
    recipe: Mapping[str, object]
    """recipe.json; empty where it was not kept."""
    env: Mapping[str, object]
    """env.json; empty where it was not kept."""
    figures: Sequence[Path]
    """PNG files."""
    results: list[Result] = field(default_factory=list)
    """Rows of results.json, one at least."""

    @property
    def backbone(self) -> str:
        """The network, "" if unknown."""
        return str(self.recipe.get("backbone", ""))

    @property
    def processes(self) -> int | None:
        """Number of processes, None if unknown."""
        world = self.env.get("world")
        return world if isinstance(world, int) else None

    @property
    def revision(self) -> str:
        """Of the code."""
        git = self.env.get("git")
        if not isinstance(git, dict):
            return "unknown"
        return str(git.get("revision", ""))[:12] + (" + changes" if git.get("dirty") else "")

    @property
    def command(self) -> str:
        """As it was typed, or one made of the recipe where env.json does not have it."""
        command = self.env.get("command")
        words = [str(word) for word in command] if isinstance(command, list) else []
        script = Path(words[0]).name if words else ""
        if script not in ("pretrain.py", "evaluate.py"):
            weights = self.recipe.get("weights") or next((r.weights for r in self.results), "")
            script = "evaluate.py" if weights else "pretrain.py"
            words = ["", str(self.results[0].recipe)]
            words += ["--weights", str(weights)] if weights else []
        start = ["torchrun", "--standalone", "--nproc-per-node", str(self.processes or 1)]
        return shlex.join([*start, f"scripts/{script}", *words[1:]])


@dataclass(frozen=True, eq=False)
class Result:
    """One row of results.json."""

    run: FinishedRun
    recipe: str
    metric: str
    value: float
    unit: str
    n: int
    kind: str | None
    """Of the weights, one of `KINDS`; None for a pretraining run's own result."""
    row: Mapping[str, object]

    @property
    def weights(self) -> str:
        """Name of the file, or "random"; "" for a pretraining run."""
        return str(self.row.get("weights", ""))

    @property
    def sha(self) -> str:
        """Checksum of the weights, "" for random ones."""
        return str(self.row.get("checkpoint_sha256") or "")

    @property
    def label(self) -> str:
        """The metric, and the settings that the row has beside it."""
        # Rows of a grid have theirs in the metric, as in top1/lr=0.1,head=10. The best of a grid
        # is one result, whichever pair it is: other weights choose another.
        names: tuple[str, ...] = SETTINGS
        if "=" in self.metric:
            names = ()
        elif "chosen_from" in self.row:
            names = SETTINGS[:1]
        return ", ".join((self.metric, *(f"{n} {self.row[n]}" for n in names if n in self.row)))


def read_runs(path: Path) -> list[FinishedRun]:
    """Read a run folder, or a folder of kept copies (NAME.results.json beside NAME.env.json, ...).

    Raises:
        ValueError: it is neither, or unfinished, or a file in it is damaged; in one line.
    """
    name = path.resolve().name
    if (path / "results.json").is_file():
        run = _read(path, name, "", sorted((path / "figures").glob("*.png")))
        # A grid marks its points as finished, and ends with the row that names the best of them.
        ended = run.recipe.get("grid") is True and "chosen_from" in run.results[-1].row
        if not ended and not (path / DONE).is_file():
            raise ValueError(f"{path} is unfinished: it has no {DONE}")
        return [run]
    kept = sorted(path.glob("*.results.json"))
    if not kept:
        raise ValueError(f"{path} is no run folder: it has no results.json")
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
            raise ValueError(f"{figure} is no whole PNG file ({error})") from error
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
    if not path.exists():
        return {}
    try:
        value = translated(json.loads(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object")
    return value


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
        raise ValueError(f"{file}: {row} is no result")
    recipe, metric, unit = (str(text) for text in texts)
    kind: str | None = None
    if row.get("benchmark") != "rotation":
        if not isinstance(weights, str) or not weights:
            raise ValueError(f"{file}: {recipe} {metric} does not say whose weights it is of")
        kind = {"random": RANDOM, "imagenet": SUPERVISED}.get(weights, TRAINED)
    return Result(run, recipe, metric, float(value), unit, n, kind, row)
