"""Settings of a run that every recipe shares: length, device, precision, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.spec import Precision

SyncBn = Literal["off", "torch", "apex"]
"""Batch norm statistics: of each process alone, or over all processes by torch or apex."""


@dataclass(frozen=True)
class RunSettings:
    """Run folder, length, device, precision and checkpoints of a run."""

    out: str = ""
    """Run folder; empty for runs/NAME. If it holds checkpoints, the run resumes from the newest."""
    epochs: int = 70
    """Passes over the training data. Learning-rate schedules span them or count them."""
    max_steps: int | None = None
    """Stop after this many steps, with the schedule of the full run (smoke tests, benchmarks)."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, or cuda."""
    precision: Precision = "bf16"
    """Autocast type: bf16, fp16 (with a gradient scaler) or fp32 (no autocast)."""
    compile: bool = False
    """Compile the network with torch.compile, once per image size. Not with SyncBN."""
    cuda_graph: bool = False
    """Replay forward and backward as one CUDA graph per image size. Helps if the CPU launches
    kernels too slowly. Needs a GPU, and batch norm without SyncBN."""
    accumulate: int = 1
    """Gradient accumulation: steps per update of the weights."""
    log_every_steps: int = 50
    """Steps between log lines. Apart from SyncBN and detection, only then does the host wait for
    the device."""
    save_every_steps: int = 1000
    """Steps between checkpoints. Another one is written at the end of each epoch."""
    profile: int = 0
    """Steps to profile, shortly after the start, into OUT/profile; 0 for none."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep, at least 2, besides the best one."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others before the job fails."""

    def total_steps(self, per_epoch: int) -> int:
        """Return the length of the run: all epochs, or `max_steps` if that is less."""
        total = self.epochs * per_epoch
        return total if self.max_steps is None else min(total, self.max_steps)

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulate", "log_every_steps", "save_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} must be at least 1, got {getattr(self, name)}")
        if self.profile < 0:
            raise ValueError(f"run.profile must not be negative, got {self.profile}")
        if self.keep_checkpoints < 2:
            raise ValueError(
                f"run.keep_checkpoints must be at least 2, got {self.keep_checkpoints}"
            )
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"run.max_steps must be at least 1, got {self.max_steps}")
