"""Fixtures of the report tests: the script, and run folders."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from pipelines.storage import write_json
from rotpred.distributed import Rank
from rotpred.records.log import RunLog
from rotpred.report.recipe_changes import PROCESSES
from tests.support.report_pages import Rows
from tests.support.scripts import load_script


class Named:
    """The part of a recipe that a log needs."""

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("report")


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write run folders with the real log: rows as the protocols write them."""

    def write(
        name: str,
        recipe: str,
        rows: Rows,
        *,
        weights: str | None = "runs/x/backbone.safetensors",
        world: int | None = None,
        fields: Mapping[str, object] | None = None,
        done: bool = True,
    ) -> Path:
        words = ["scripts/evaluate.py", recipe] + (["--weights", weights] if weights else [])
        monkeypatch.setattr(sys, "argv", words)
        git = {"revision": "0123456789abcdef", "dirty": True}
        monkeypatch.setattr("rotpred.records.folder.git_state", lambda _: git)
        about = {"name": recipe, "weights": weights, "backbone": "resnet50", **(fields or {})}
        out = tmp_path / name
        rank = Rank(world=world or PROCESSES.get(recipe, 2))
        log = RunLog(out, Named(recipe), rank, total_steps=1)
        with log:
            for row in rows:
                extra = {} if weights is None else {"weights": Path(weights).name}
                random = weights in (None, "random")
                sha = None if random else "ab" * 32
                row = {"benchmark": recipe, "unit": "%", "n": 400, "checkpoint_sha256": sha} | row
                log.result(row.pop("benchmark"), **extra, **row)
            log.figure("curves", Figure(figsize=(1, 1)))
        write_json(out / "recipe.json", about)
        if done:
            write_json(out / "done.json", {})
        return out

    return write
