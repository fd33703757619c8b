"""Contestant: the training step of pretraining, without a loader."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat

import torch

from harness.timing import memory_mib, synchronize, window
from harness.training_step import WARMUP_STEPS, Step, resident_batch, run_steps
from pipelines.spec import Precision
from rotpred.training.settings import Optim, RunSettings


class StepContestant:
    """The step on a batch in device memory: the ceiling of training."""

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
        """Return the seconds to the first step, with compilation, and GFLOP per source image."""
        backbone, size, batch_size = self.options
        begin = time.perf_counter()
        self.batch = resident_batch(
            size, batch_size, precision=self.run.precision, device=self.run.device
        )
        self.step = Step(backbone, run=self.run, optim=self.optim, batch_size=batch_size)
        self.step(self.batch)
        synchronize(self.device)
        first = time.perf_counter() - begin
        for _ in range(WARMUP_STEPS):
            self.step(self.batch)
        synchronize(self.device)
        counted = self._count()
        return {"first_batch_seconds": round(first, 3), "gigaflop_per_image": counted}

    def _count(self) -> float:
        """Return GFLOP per source image, counted on a network that is not compiled."""
        backbone, size, _ = self.options
        few = resident_batch(size, 2, precision=self.run.precision, device=self.run.device)
        plain = replace(self.run, compile=False, cuda_graph=False)
        step = Step(backbone, run=plain, optim=Optim(lr=1e-3), batch_size=2)
        return round(step.flops(few) / 2 / 1e9, 4)

    def window(self, seconds: float) -> tuple[int, float, float]:
        """Run steps for about `seconds`; returns the fields of a `Window`."""
        return tuple(window(self._steps(), seconds=seconds, device=self.device))

    def _steps(self) -> Iterator[int]:
        yield from run_steps(self.step, repeat(self.batch), self.device)

    def memory(self) -> dict[str, float]:
        """Return MiB: memory of the process and peak memory of the GPU."""
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return {**memory_mib(), "peak_device_mib": round(peak / 2**20, 1)}

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
