"""CUDA graphs without a GPU: shapes, static inputs and gradients, with a fake capture.

The fake obeys CUDA's rules as far as a CPU can: what is recorded does nothing until it is
called, reads and writes the same memory each time, and its results are overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

from pipelines.spec import LoaderSpec, RandomResizedCrop
from rotpred.distributed import Rank, process_group
from rotpred.models.heads import make_rotnet
from rotpred.models.memory_format import channels_last
from rotpred.protocols import pretrain
from rotpred.recipes.pretrain import Pretrain
from rotpred.training.cuda_graphs import WARM_UP, CudaCapture, FlatGradients, Graphs
from rotpred.training.schedule import Steps
from rotpred.training.settings import Optim, RunSettings
from rotpred.training.state import LossAndLogs, OptimizedPart, TrainState
from rotpred.training.sync_bn import check_sync_bn
from tests.support import processes

# One thread: on a busy machine, threads that wait for one another take minutes for these networks.
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

T = TypeVar("T")


class Tape(CudaCapture):
    """Captures by storing the call; replays into the tensors of the first result."""

    def __init__(self) -> None:  # without a GPU
        self.eager_calls, self.replays, self.recorded = 0, 0, 0

    def eager(self, work: Callable[[], T]) -> T:
        self.eager_calls += 1
        return work()

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        self.recorded += 1
        kept: list[T] = []

        def replay() -> T:
            self.replays += 1
            result = work()
            if not kept:
                kept.append(tree_map(torch.clone, result))
            tree_map(lambda to, value: to.copy_(value), kept[0], result)
            return kept[0]

        return replay


def state(folder: Path, tape: Tape | None, **run: object) -> TrainState:
    torch.manual_seed(0)
    rank = Rank()
    model = channels_last(make_rotnet("resnet18_tiny"), rank.device).train()
    with mock.patch("rotpred.training.state.CudaCapture", return_value=tape):
        return TrainState(
            model,
            [OptimizedPart(model, Optim(lr=0.05, nesterov=True), Steps((0.5,)))],
            rank=rank,
            run=RunSettings(epochs=1, precision="fp32", cuda_graph=tape is not None, **run),  # type: ignore[arg-type]
            folder=folder,
            global_batch=8,
            identity={"backbone": "resnet18_tiny"},
        )


def train(made: TrainState, batches: list[torch.Tensor]) -> list[float]:
    """Train, and return the logged loss averaged over pairs of steps."""

    def objective(batch: tuple[torch.Tensor, torch.Tensor]) -> LossAndLogs:
        images, targets = batch
        with made.autocast():
            loss = cross_entropy(made.model(images), targets)
        return loss, {"loss": loss}

    means = []
    for images in batches:
        made.begin_step(made.step / len(batches), final=made.step + 1 == len(batches))
        made.train_step(objective, (images, torch.arange(len(images)) % 4))
        made.step += 1
        if made.step % 2 == 0:
            means.append(made.means()["loss"])
    return means


@pytest.mark.parametrize("accumulate", [1, 3])
def test_graphs_train_as_eager_steps_do(tmp_path: Path, accumulate: int) -> None:
    """Two alternating sizes: weights, statistics, momenta and logged means are bit-equal."""
    torch.manual_seed(1)
    batches = [
        torch.randn(8, 3, side, side).to(memory_format=torch.channels_last)
        for side in (16, 16, 24, 16, 16, 24, 24, 24, 24, 16)
    ]
    tape = Tape()
    plain = state(tmp_path, None, accumulate=accumulate)
    graphed = state(tmp_path, tape, accumulate=accumulate)
    assert train(plain, batches) == train(graphed, batches)
    assert (tape.recorded, tape.eager_calls) == (2, 2 * WARM_UP)
    assert tape.replays == len(batches) - 2 * WARM_UP
    expected, found = plain.module.state_dict(), graphed.module.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    momenta = [
        [s["momentum_buffer"] for s in made._optimizers[0].state_dict()["state"].values()]
        for made in (plain, graphed)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))
    assert not graphed.has_non_finite


def test_inputs_are_copied_to_memory_that_stays() -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []

    def work(x: torch.Tensor) -> torch.Tensor:
        seen.append((x.data_ptr(), x.stride()))
        return 2 * x

    graphs = Graphs(Tape(), work)
    results = []
    for value in range(WARM_UP + 3):
        x = torch.full((2, 3, 4, 4), float(value)).to(memory_format=torch.channels_last)
        results.append(graphs(x))
        assert torch.equal(results[-1], 2 * x)
    assert len(set(seen)) == 1 and seen[0][1] == x.stride()
    assert results[-1] is results[-2], "borrowed: the same memory at every replay"


def test_gradients_are_views_laid_out_as_their_weights() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5, 2))
    net = net.to(memory_format=torch.channels_last)
    net[2].bias.requires_grad_(False)
    flat = FlatGradients(net.parameters())
    net(torch.randn(4, 3, 3, 3)).square().sum().backward()
    twin = [p.grad.clone() for p in net.parameters() if p.requires_grad]
    assert all(g.abs().sum() > 0 for g in twin)
    assert net[0].weight.grad.stride() == net[0].weight.stride()
    assert net[2].bias.grad is None
    places = {p.grad.untyped_storage().data_ptr() for p in net.parameters() if p.requires_grad}
    assert len(places) == 1
    assert all(p.grad.data_ptr() % 64 == 0 for p in net.parameters() if p.requires_grad)
    flat.zero()
    assert all(p.grad.abs().sum() == 0 for p in net.parameters() if p.requires_grad)
    net.zero_grad(set_to_none=True)
    net(torch.randn(4, 3, 3, 3)).sum().backward()  # autograd allocates freed gradients anew
    assert net[0].weight.grad.untyped_storage().data_ptr() not in places


def train_half(out: Path) -> int:
    """Train on half of each batch, starting with different weights on the two ranks."""
    with process_group("cpu", timeout_seconds=60) as rank:
        torch.manual_seed(rank.rank)
        net = _train_half(rank)
        torch.save(net.weight.detach(), out / f"{rank.rank}.pt")
    return 0


def _train_half(rank: Rank) -> nn.Linear:
    net = nn.Linear(5, 4)
    with mock.patch("rotpred.training.state.CudaCapture", return_value=Tape()):
        made = TrainState(
            net,
            [OptimizedPart(net, Optim(lr=0.1), Steps())],
            rank=rank,
            run=RunSettings(epochs=1, precision="fp32", cuda_graph=True),
            folder=Path(),
            global_batch=8,
            identity={},
        )

    def objective(batch: tuple[torch.Tensor, torch.Tensor]) -> LossAndLogs:
        x, y = batch
        loss = cross_entropy(made.model(x), y)
        return loss, {"loss": loss}

    for _ in range(WARM_UP + 2):
        made.begin_step(0.0)
        made.train_step(objective, _halves(rank.rank))
    return net


def _halves(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
    part = slice(4 * number, 4 * number + 4)
    return x[part], (torch.arange(8) % 4)[part]


def test_two_processes_average_what_a_graph_left(tmp_path: Path) -> None:
    """Against plain SGD on the whole batch, from the weights of rank 0."""
    console = tmp_path / "console"
    status = processes.run(train_half, tmp_path, console=console, world=2)
    assert status == [0, 0], console.read_text()
    found = [torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in range(2)]
    torch.manual_seed(0)
    net = nn.Linear(5, 4)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    x, y = (torch.cat(pair) for pair in zip(_halves(0), _halves(1), strict=True))
    for _ in range(WARM_UP + 2):
        sgd.zero_grad()
        cross_entropy(net(x), y).backward()
        sgd.step()
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], net.weight.detach(), rtol=1e-5, atol=1e-6)


def test_a_cpu_has_no_graphs(tmp_path: Path) -> None:
    spec = LoaderSpec(data="synthetic", samples=8, batch_size=4, crop=RandomResizedCrop(32))
    recipe = Pretrain(
        backbone="nin3",
        train=spec,
        run=RunSettings(out=str(tmp_path), epochs=1, precision="fp32", cuda_graph=True),
    )
    with (
        process_group("cpu", threads=1) as rank,
        pytest.raises(ValueError, match=r"cuda_graph needs a GPU.*--run\.no-cuda-graph"),
    ):
        pretrain.run(recipe, rank)


@pytest.mark.parametrize("option", ["cuda_graph", "compile"])
def test_synchronised_batch_norm_goes_with_neither(option: str) -> None:
    run = replace(RunSettings(), **{option: True})  # type: ignore[arg-type]
    words = rf"sync_bn=torch.*--run\.no-{option.replace('_', '-')}"
    with pytest.raises(ValueError, match=words):
        check_sync_bn("torch", Rank(world=2, device=torch.device("cuda:0")), run)
