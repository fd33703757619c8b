"""The profile of a run: a trace with our ranges, a table of operators, failures."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from pipelines.spec import LoaderSpec, RandomResizedCrop
from rotpred.distributed import Rank
from rotpred.protocols import pretrain
from rotpred.recipes.pretrain import Pretrain
from rotpred.training import profiler
from rotpred.training.profiler import TABLE, TRACE, WAIT, WARM_UP, profiled
from rotpred.training.settings import RunSettings

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")


def test_a_profiled_run(tmp_path: Path) -> None:
    """Two steps are traced, each with its ranges; the table names operators."""
    spec = LoaderSpec(data="synthetic", samples=44, batch_size=4, crop=RandomResizedCrop(32))
    recipe = Pretrain(
        backbone="nin3",
        train=spec,
        run=RunSettings(out=str(tmp_path / "run"), epochs=1, precision="fp32", profile=2),
    )
    assert spec.samples // spec.batch_size >= WAIT + WARM_UP + 2
    out = pretrain.run(recipe, Rank())
    events = json.loads((out / "profile" / TRACE).read_bytes())["traceEvents"]
    names = [event.get("name", "") for event in events]
    for name in ("device", "data wait", "rotate", "forward", "backward", "optimiser"):
        assert names.count(name) == 2, name
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert "conv" in (out / "profile" / TABLE).read_text()
    assert sorted(path.name for path in (out / "profile").iterdir()) == sorted([TRACE, TABLE])


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace from the second step on."""
    monkeypatch.setattr(profiler, "WAIT", 0)
    monkeypatch.setattr(profiler, "WARM_UP", 1)


def test_no_profile_unless_asked_for(tmp_path: Path) -> None:
    with profiled(tmp_path / "profile", 0, CPU) as step:
        step()
    assert not (tmp_path / "profile").exists()


def test_a_run_that_is_too_short_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), profiled(tmp_path, 3, CPU) as step:
        step()
    assert "no profile" in caplog.text and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_wait")
def test_a_run_that_stops_within_its_profile_leaves_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(KeyError), profiled(tmp_path / "profile", 50, CPU) as step:
        for _ in range(4):
            torch.ones(3).add(1)
            step()
        raise KeyError
    text = (tmp_path / "profile" / TRACE).read_text()
    assert "aten::add" in text and json.loads(text)["traceEvents"]


@pytest.mark.usefixtures("no_wait")
def test_a_profile_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("a file")
    with (
        caplog.at_level(logging.WARNING),
        profiled(tmp_path / "profile", 1, CPU) as step,
    ):
        step()
        step()
    assert "cannot write the profile" in caplog.text


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize("part", ["key_averages", "export_chrome_trace"])
def test_a_profile_that_the_tracer_refuses_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise RuntimeError("no trace")

    monkeypatch.setattr(torch.profiler.profile, part, refuse)
    with (
        caplog.at_level(logging.WARNING),
        profiled(tmp_path / "profile", 1, CPU) as step,
    ):
        step()
        step()
    assert "cannot write the profile: no trace" in caplog.text
