"""Transfer, views, training steps without host synchronisation, CUDA graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from pipelines.batch import Batch, RawBatch
from pipelines.device.transfer import Transfer
from pipelines.loader import open_loader
from pipelines.spec import CenterCrop, LoaderSpec, RandomCrop, RandomResizedCrop
from rotpred.distributed import Rank
from rotpred.models.heads import make_rotnet
from rotpred.models.memory_format import channels_last
from rotpred.protocols import pretrain
from rotpred.recipes.pretrain import Pretrain
from rotpred.training.schedule import Steps
from rotpred.training.settings import Optim, RunSettings
from rotpred.training.state import LossAndLogs, OptimizedPart, TrainState
from tests.support.engines import engines

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


VARIANTS: dict[str, dict[str, object]] = {
    "ffcv": {},
    "ffcv-regions": {"resize": "device"},
    "folder": {},
    "dali": {"hw_decoder_load": 0.0},
    "dali-engine": {"hw_decoder_load": 1.0},
    "dali-cpu": {"decoder": "cpu"},
}


@pytest.mark.parametrize("name", engines(*VARIANTS))
def test_batches_on_the_gpu_equal_those_on_the_cpu(beton: Path, name: str) -> None:
    """Batches of two epochs of different sizes, kept while the device is busy, as on the CPU."""
    engine = name.split("-")[0]
    spec = LoaderSpec(
        data=str(beton),
        engine=engine,  # type: ignore[arg-type]
        batch_size=4,
        crop=RandomResizedCrop(32),
        resolution_schedule=((0, 24), (1, 32)),
        workers=2,
    )
    busy = torch.randn(2048, 2048, device="cuda")
    there_spec = replace(spec, **VARIANTS[name])  # type: ignore[arg-type]
    with open_loader(there_spec, device="cuda:0") as there, open_loader(spec) as here:
        for epoch in (0, 1):
            kept = []
            for batch in there.epoch(epoch):
                busy = busy @ busy * 1e-3  # the copies must not rely on an idle device
                kept.append(batch)
            for found, expected in zip(kept, here.epoch(epoch), strict=True):
                assert torch.equal(found.indices.cpu(), expected.indices)
                assert torch.equal(found.labels.cpu(), expected.labels)
                assert torch.equal(found.targets.cpu(), expected.targets)
                assert torch.equal(found.valid.cpu(), expected.valid)
                # nvJPEG's inverse DCT is not libjpeg's, and DALI's resize on the GPU rounds on its
                # own; the other engines transfer exactly what the CPU has.
                limit = 0.05 if engine == "dali" else 1e-5
                assert (found.images.cpu() - expected.images).abs().mean() < limit
        assert there.digest == here.digest


def test_crops_lie_in_two_buffers_in_turn() -> None:
    """Nothing is allocated per batch, and a buffer is written only after its last reader."""
    transfer = Transfer(torch.device("cuda:0"))
    busy = torch.randn(4096, 4096, device="cuda")
    places, sums = [], []
    for number in range(8):
        images = torch.full((4, 16, 16, 3), number, dtype=torch.uint8).pin_memory()
        small = torch.full((4,), number)
        raw = RawBatch(images, small, small, small >= 0, torch.zeros((4, 5), dtype=torch.int32))
        transfer.wait()
        moved = transfer.copy(transfer.fetch(iter([raw])))
        busy = busy @ busy * 1e-3  # readers are slow
        places.append(moved.images.data_ptr())
        sums.append(moved.images.float().mean() + 0 * busy[0, 0])
        transfer.release()
    assert len(set(places)) == 2 and places == places[:2] * 4
    assert torch.stack(sums).tolist() == list(range(8))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_never_waits_for_the_device(tmp_path: Path, precision: str) -> None:
    spec = LoaderSpec(data="synthetic", samples=64, batch_size=8, crop=RandomCrop(32, 0))
    rank = Rank(device=torch.device("cuda:0"))
    run = RunSettings(epochs=1, precision=precision)  # type: ignore[arg-type]
    model = channels_last(make_rotnet("resnet18_small"), rank.device).train()
    state = TrainState(
        model,
        [OptimizedPart(model, Optim(lr=0.01), Steps())],
        rank=rank,
        run=run,
        folder=tmp_path,
        global_batch=8,
        identity={"backbone": "resnet18_small"},
    )

    def objective(batch: Batch) -> LossAndLogs:
        with state.autocast():
            loss = cross_entropy(state.model(batch.images), batch.targets)
        return loss, {"loss": loss}

    with open_loader(spec, device="cuda:0", precision=run.precision) as loader:
        for number, batch in enumerate(loader.epoch(0)):
            if number == 2:  # the first steps allocate, tune and create constants
                torch.cuda.set_sync_debug_mode("error")
            try:
                state.begin_step(0.0)
                state.train_step(objective, batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert state.means()["loss"] < 10 and not state.has_non_finite


def test_a_run_on_the_gpu_resumes(tmp_path: Path) -> None:
    spec = LoaderSpec(data="synthetic", samples=64, batch_size=8, crop=RandomCrop(32, 0))
    recipe = Pretrain(
        name="tiny",
        backbone="resnet18_small",
        train=spec,
        val=replace(
            spec, samples=19, crop=CenterCrop(32, None), flip=False, shuffle=False, drop_last=False
        ),
        optim=Optim(lr=0.01),
        run=RunSettings(
            out=str(tmp_path / "run"), epochs=2, max_steps=5, log_every_steps=2, save_every_steps=2
        ),
    )
    rank = Rank(device=torch.device("cuda:0"))
    pretrain.run(recipe, rank)
    longer = replace(recipe, run=replace(recipe.run, max_steps=None))
    out = pretrain.run(longer, rank)
    assert (out / "backbone.safetensors").exists() and (out / "results.json").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_train_as_eager_steps_do(tmp_path: Path, precision: str, compiled: bool) -> None:
    """Two sizes, with captures in between: weights after ten steps agree with eager training."""
    rank = Rank(device=torch.device("cuda:0"))
    weights, losses = [], []
    for graphs in (False, True):
        torch.manual_seed(0)
        model = channels_last(make_rotnet("resnet18_small"), rank.device).train()
        state = TrainState(
            model,
            [OptimizedPart(model, Optim(lr=0.01), Steps())],
            rank=rank,
            run=RunSettings(epochs=1, precision=precision, compile=compiled, cuda_graph=graphs),  # type: ignore[arg-type]
            folder=tmp_path,
            global_batch=8,
            identity={"backbone": "resnet18_small"},
        )

        def objective(
            batch: tuple[torch.Tensor, torch.Tensor], state: TrainState = state
        ) -> LossAndLogs:
            images, targets = batch
            with state.autocast():
                loss = cross_entropy(state.model(images), targets)
            return loss, {"loss": loss}

        draw = torch.Generator().manual_seed(1)
        for side in (32,) * 5 + (48,) * 5:
            images = torch.randn(8, 3, side, side, generator=draw).to(rank.device)
            state.begin_step(0.0)
            images = images.to(memory_format=torch.channels_last)
            state.train_step(objective, (images, torch.arange(8, device=rank.device) % 4))
            state.step += 1
        weights.append([p.detach().clone() for p in model.parameters()])
        losses.append(state.means()["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if precision == "fp32" else 0.05)
    for found, expected in zip(weights[1], weights[0], strict=True):
        # Autotuning may choose other convolution algorithms: equal up to rounding, not bit for bit.
        moved = (expected - found).norm() / expected.norm()
        assert moved < (1e-3 if precision == "fp32" else 2e-2)
