"""The training step as pretraining makes it, on batches from anywhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from harness.results import Timing
from harness.timing import finish, memory_mib, window
from pipelines.batch import Batch
from pipelines.loader import open_loader
from pipelines.spec import Engine, LoaderSpec, Precision, RandomResizedCrop
from rotpred.distributed import Rank
from rotpred.models.heads import make_rotnet
from rotpred.models.memory_format import channels_last
from rotpred.training.optim import Optim
from rotpred.training.schedule import Steps
from rotpred.training.settings import RunSettings
from rotpred.training.state import LossAndLogs, OptimizedPart, TrainState

ON_GPU = torch.cuda.is_available()
LEAD_STEPS = 8
WARMUP_STEPS = 8
"""Enough for cuDNN's search, compilation and the capture of a graph."""


@dataclass(frozen=True)
class Training(Timing):
    """What is trained, and how its data come: of the programs that time training or its stages."""

    engine: Engine = "auto"
    """Who decodes."""
    backbone: str = "resnet50" if ON_GPU else "resnet18_tiny"
    """As in a recipe."""
    size: int = 224 if ON_GPU else 64
    """Side of the crops in pixels."""
    batch_size: int = 64 if ON_GPU else 16
    """Source images per step."""
    precision: Precision = "bf16" if ON_GPU else "fp32"
    """Type that the network computes in."""
    compile: bool = False
    """torch.compile the network."""
    cuda_graph: bool = False
    """Replay forward and backward as a CUDA graph."""
    workers: int = 0
    """Decoding threads; 0: chosen by the loader within its share of the cores (`cpu_budget`)."""
    device: str = "cuda" if ON_GPU else "cpu"
    """Where to train."""


class Step:
    """Forward, backward and update of one network."""

    def __init__(self, backbone: str, *, run: RunSettings, optim: Optim, batch_size: int) -> None:
        """Build it on the device that `run` names.

        Args:
            backbone: as in a recipe.
            run: device, precision, compile and graphs.
            optim: of all weights.
            batch_size: source images, for the scaled learning rate.
        """
        self.device = torch.device(run.device)
        if self.device.type == "cuda":
            # As `rotpred.distributed.init` does: shapes do not change.
            torch.backends.cudnn.benchmark = True
        self.module = channels_last(make_rotnet(backbone), self.device).train()
        self.state = TrainState(
            self.module,
            [OptimizedPart(self.module, optim, Steps())],
            rank=Rank(device=self.device),
            run=run,
            folder=Path(),
            global_batch=batch_size,
            identity={},
        )

    def __call__(self, batch: Batch) -> None:
        """One step; nothing is read back."""
        self.state.begin_step(0.0)
        self.state.train_step(self._objective, batch.images, batch.targets, batch.valid)

    def _objective(
        self, images: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor
    ) -> LossAndLogs:
        with self.state.autocast():
            logits = self.state.model(images)
            loss = cross_entropy(logits, targets)
        hits = (logits.argmax(1) == targets).sum() / valid.sum()
        return loss, {"loss": loss, "accuracy": 100 * hits}

    def flops(self, batch: Batch) -> int:
        """Floating point operations of forward and backward on a batch, counted by torch."""
        counter = FlopCounterMode(display=False)
        with counter, self.state.autocast():
            cross_entropy(self.module(batch.images), batch.targets).backward()
        self.module.zero_grad(set_to_none=True)
        return int(counter.get_total_flops())


def resident_batch(size: int, batch_size: int, *, precision: Precision, device: str) -> Batch:
    """A batch of noise that lies on the device: what a loader without any cost would give."""
    spec = LoaderSpec(
        data="synthetic", batch_size=batch_size, samples=batch_size, crop=RandomResizedCrop(size)
    )
    with (
        open_loader(spec, device=device, precision=precision) as loader,
        closing(loader.epoch(0)) as batches,
    ):
        return next(batches)


class StepPlayer:
    """The step on a resident batch as a contestant: the ceiling of training."""

    def __init__(
        self,
        *,
        backbone: str,
        size: int,
        batch_size: int,
        precision: Precision,
        compile: bool,
        cuda_graph: bool,
        apex: bool,
        device: str,
    ) -> None:
        self.options = backbone, size, batch_size
        self.run = RunSettings(
            device=device, precision=precision, compile=compile, cuda_graph=cuda_graph
        )
        self.optim = Optim(lr=1e-3, kind="apex_sgd" if apex else "sgd")
        self.device = torch.device(device)

    def first_batch(self) -> dict[str, float]:
        """Seconds until the first step is done, compilation included; operations of one step."""
        backbone, size, batch_size = self.options
        begin = time.perf_counter()
        self.batch = resident_batch(
            size, batch_size, precision=self.run.precision, device=self.run.device
        )
        self.step = Step(backbone, run=self.run, optim=self.optim, batch_size=batch_size)
        self.step(self.batch)
        finish(self.device)
        first = time.perf_counter() - begin
        for _ in range(WARMUP_STEPS):
            self.step(self.batch)
        finish(self.device)
        counted = self._count()
        return {"first_batch_seconds": round(first, 3), "gigaflop_per_image": counted}

    def _count(self) -> float:
        """Operations per source image, counted on a network that is not compiled."""
        backbone, size, _ = self.options
        few = resident_batch(size, 2, precision=self.run.precision, device=self.run.device)
        plain = replace(self.run, compile=False, cuda_graph=False)
        step = Step(backbone, run=plain, optim=Optim(lr=1e-3), batch_size=2)
        return round(step.flops(few) / 2 / 1e9, 4)

    def window(self, seconds: float) -> tuple[int, float, float]:
        """Steps for about `seconds`."""
        return tuple(window(self._steps(), seconds=seconds, device=self.device))

    def _steps(self) -> Iterator[int]:
        yield from stepping(self.step, repeat(self.batch), self.device)

    def memory(self) -> dict[str, float]:
        """MiB of the process, and at most of the GPU."""
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return {**memory_mib(), "peak_device_mib": round(peak / 2**20, 1)}

    def close(self) -> None:
        """Nothing is left behind."""


def stepping(step: Step, batches: Iterator[Batch], device: torch.device) -> Iterator[int]:
    """Make steps and say how many images each took.

    A GPU may lag behind by `LEAD_STEPS` steps and no more: else the clock would time the queueing
    of kernels. It is never waited for until it has nothing to do, which would add the time that a
    launch takes to what is measured.
    """
    queued: deque[torch.cuda.Event] = deque()
    for batch in batches:
        step(batch)
        if device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(device))
            queued.append(done)
            if len(queued) > LEAD_STEPS:
                queued.popleft().synchronize()
        yield len(batch.indices)
