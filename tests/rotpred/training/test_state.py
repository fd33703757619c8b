"""Training state: data parallelism, gradient accumulation, non-finite values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pipelines.batch import Batch
from pipelines.loader import open_loader
from pipelines.spec import CenterCrop, LoaderSpec, RandomResizedCrop, Shard
from rotpred.distributed import Rank, process_group
from rotpred.protocols import pretrain
from rotpred.recipes.pretrain import Pretrain
from rotpred.records.log import read_rows
from rotpred.training.data import check_data
from rotpred.training.schedule import Steps
from rotpred.training.settings import Optim, RunSettings
from rotpred.training.state import LossAndLogs, LossFn, OptimizedPart, TrainState
from tests.support import processes

pytestmark = pytest.mark.timeout(200)


def train_alike(data: Path, out: Path) -> int:
    """One of one or two processes: an epoch in global batches of 8; the main one saves weights."""
    with process_group("cpu", timeout_seconds=60) as rank:
        torch.manual_seed(0)
        spec = LoaderSpec(
            data=str(data), engine="folder", batch_size=8 // rank.world,
            crop=RandomResizedCrop(16), workers=1,
        )  # fmt: skip
        # No batch norm: its statistics are each process's own, and rightly differ.
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 4)
        )
        state = TrainState(
            model, [OptimizedPart(model, Optim(lr=0.1), Steps())], rank=rank,
            run=RunSettings(epochs=1), folder=None, global_batch=8, identity={},
        )  # fmt: skip

        def objective(batch: Batch) -> LossAndLogs:
            loss = cross_entropy(state.model(batch.images), batch.targets)
            return loss, {"loss": loss}

        with open_loader(spec, shard=Shard(rank.rank, rank.world)) as loader:
            for batch in loader.epoch(0):
                state.begin_step(0.0)
                state.train_step(objective, batch)
        if rank.main:
            torch.save(model.state_dict(), out)
    return 0


def test_two_processes_train_as_one(beton: Path, tmp_path: Path) -> None:
    weights = []
    for world in (1, 2):
        out, console = tmp_path / f"{world}.pt", tmp_path / f"console{world}"
        status = processes.run(train_alike, beton, out, console=console, world=world)
        assert status == [0] * world, console.read_text()[-3000:]
        weights.append(torch.load(out, weights_only=True))
    one, two = weights
    torch.manual_seed(0)
    begin = nn.Conv2d(3, 8, 3).weight
    assert (one["0.weight"] - begin).abs().max() > 1e-3  # training changed the weights
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)


def _state(model: nn.Module, folder: Path, **run: object) -> TrainState:
    return TrainState(
        model,
        [OptimizedPart(model, Optim(lr=0.1), Steps())],
        rank=Rank(),
        run=RunSettings(epochs=1, precision="fp32", **run),  # type: ignore[arg-type]
        folder=folder,
        global_batch=4,
        identity={"backbone": "none"},
    )


def objective(state: TrainState) -> LossFn:
    def work(batch: tuple[torch.Tensor, torch.Tensor]) -> LossAndLogs:
        x, y = batch
        loss = cross_entropy(state.model(x), y)
        return loss, {"loss": loss}

    return work


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """Two half batches with accumulate=2 give the update of one whole batch."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 5), torch.arange(8) % 4
    models = [nn.Linear(5, 4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    whole, halves = _state(models[0], tmp_path), _state(models[1], tmp_path, accumulate=2)
    whole.begin_step(0.0)
    whole.train_step(objective(whole), (x, y))
    for part in (slice(0, 4), slice(4, 8)):
        halves.begin_step(0.0)
        halves.train_step(objective(halves), (x[part], y[part]))
        halves.step += 1
    assert halves.at_update
    for found, expected in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_last_step_uses_what_has_come_together(tmp_path: Path) -> None:
    model = nn.Linear(5, 4)
    before = model.weight.detach().clone()
    state = _state(model, tmp_path, accumulate=4)
    state.begin_step(0.0, final=True)
    state.train_step(objective(state), (torch.randn(3, 5), torch.arange(3)))
    assert state.at_update and not torch.equal(model.weight, before)


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_what_is_not_finite_is_noticed(tmp_path: Path, where: str) -> None:
    model = nn.Linear(5, 4)
    state = _state(model, tmp_path)
    state.begin_step(0.0)
    factor = torch.tensor(float("inf") if where == "loss" else 1.0)

    def objective(batch: tuple[torch.Tensor, torch.Tensor]) -> LossAndLogs:
        x, y = batch
        loss = cross_entropy(state.model(x), y) * factor
        return loss, {"loss": loss}

    assert not state.has_non_finite
    state.train_step(objective, (torch.randn(3, 5), torch.arange(3)))
    assert state.has_non_finite == (where == "loss")
    if where == "weight":
        with torch.no_grad():
            model.weight[0, 0] = float("nan")
    assert state.has_non_finite


def test_a_run_over_two_sides(folder: Path, tmp_path: Path) -> None:
    """Real images at 16 pixels, then at 24, as logged; another schedule is another run."""
    train = LoaderSpec(
        data=str(folder),
        batch_size=12,
        crop=RandomResizedCrop(24),
        resolution_schedule=((0, 16), (1, 24)),
        workers=1,
    )
    val = replace(
        train, crop=CenterCrop(24, 28), resolution_schedule=(), shuffle=False, drop_last=False
    )
    recipe = Pretrain(
        backbone="resnet18_tiny",
        train=train,
        val=val,
        optim=Optim(lr=0.01),
        run=RunSettings(out=str(tmp_path / "run"), epochs=2, precision="fp32", log_every_steps=1),
    )
    out = pretrain.run(recipe, Rank())
    rows = [row for row in read_rows(out / "log.jsonl") if "loss" in row]
    assert [row["side"] for row in rows] == [16, 16, 16, 24, 24, 24]
    assert all(float(str(row["images_per_s"])) > 0 for row in rows)
    (result,) = json.loads((out / "results.json").read_text())
    assert result["n"] == 37 * 4
    other = replace(recipe, train=replace(train, resolution_schedule=((0, 16),)))
    words = r"another run \(resolution_schedule: \[\[0, 16\], \[1, 24\]\] there"
    with pytest.raises(ValueError, match=words):
        pretrain.run(other, Rank())


def test_padded_training_data_are_refused() -> None:
    spec = LoaderSpec(samples=5, batch_size=2, crop=RandomResizedCrop(8), drop_last=False)
    with (
        open_loader(spec) as loader,
        pytest.raises(ValueError, match="drop_last must be True"),
    ):
        check_data(loader, Rank())
