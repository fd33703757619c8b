"""The training step of pretraining, isolated for timing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.results import TimingOptions
from pipelines.batch import Batch
from pipelines.loader import open_loader
from pipelines.spec import Engine, LoaderSpec, Precision, RandomResizedCrop
from rotpred.distributed import Rank
from rotpred.models.heads import make_rotnet
from rotpred.models.memory_format import channels_last
from rotpred.protocols.pretrain import rotation_objective
from rotpred.training.schedule import Steps
from rotpred.training.settings import Optim, RunSettings
from rotpred.training.state import OptimizedPart, TrainState

ON_GPU = torch.cuda.is_available()
LEAD_STEPS = 8
WARMUP_STEPS = 8
"""Enough for cuDNN's kernel search, compilation and CUDA graph capture."""


@dataclass(frozen=True)
class TrainingOptions(TimingOptions):
    """Options of the programs that time training or its stages."""

    engine: Engine = "auto"
    """The engine that decodes."""
    backbone: str = "resnet50" if ON_GPU else "resnet18_tiny"
    """The network, named as in a recipe."""
    size: int = 224 if ON_GPU else 64
    """Side of the crops in pixels."""
    batch_size: int = 64 if ON_GPU else 16
    """Source images per step."""
    precision: Precision = "bf16" if ON_GPU else "fp32"
    """Autocast type of the network."""
    compile: bool = False
    """torch.compile the network."""
    cuda_graph: bool = False
    """Replay forward and backward as a CUDA graph."""
    workers: int = 0
    """Decoding threads; 0: the loader chooses within its share of the cores (`cpu_budget`)."""
    device: str = "cuda" if ON_GPU else "cpu"
    """The device to train on."""


class Step:
    """Forward, backward and update of one network, as `rotpred.protocols.pretrain` runs them."""

    def __init__(self, backbone: str, *, run: RunSettings, optim: Optim, batch_size: int) -> None:
        """Build the network on the device that `run` names.

        Args:
            backbone: The network, named as in a recipe.
            run: Device, precision, compilation and CUDA graphs.
            optim: Optimiser of all weights.
            batch_size: Source images per step, for the scaled learning rate.
        """
        self.device = torch.device(run.device)
        if self.device.type == "cuda":
            # As in `rotpred.distributed.process_group`: shapes do not change.
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
        self.objective = rotation_objective(self.state)

    def __call__(self, batch: Batch) -> None:
        """Run one step; nothing is copied back to the host."""
        self.state.begin_step(0.0)
        self.state.train_step(self.objective, batch)

    def flops(self, batch: Batch) -> int:
        """Return the floating point operations of forward and backward, as counted by torch."""
        counter = FlopCounterMode(display=False)
        with counter:
            self.objective(batch)[0].backward()
        self.module.zero_grad(set_to_none=True)
        return int(counter.get_total_flops())


def resident_batch(size: int, batch_size: int, *, precision: Precision, device: str) -> Batch:
    """Return a batch of noise in device memory: what a loader without any cost would give.

    Args:
        size: Side of the crops S in pixels.
        batch_size: Source images B; the batch holds 4 B views, (4 B, 3, S, S).
        precision: Type of the views.
        device: The device.
    """
    spec = LoaderSpec(
        data="synthetic", batch_size=batch_size, samples=batch_size, crop=RandomResizedCrop(size)
    )
    with (
        open_loader(spec, device=device, precision=precision) as loader,
        closing(loader.epoch(0)) as batches,
    ):
        return next(batches)


def run_steps(step: Step, batches: Iterator[Batch], device: torch.device) -> Iterator[int]:
    """Run one step per batch and yield its number of source images.

    The host may be at most `LEAD_STEPS` steps ahead of a GPU; otherwise the clock would time only
    the queueing of kernels. The GPU is never drained, which would add launch latency to the result.
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
