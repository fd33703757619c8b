"""Settings of a run that every recipe shares: length, device, precision, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pipelines.checks import Checked, NonNegativeInt, PositiveFloat, PositiveInt, at_least
from pipelines.spec import Precision


@dataclass(frozen=True)
class RunSettings(Checked):
    """Run folder, length, device, precision and checkpoints of a run."""

    out: str = ""
    """Run folder; empty for runs/NAME. If it holds checkpoints, the run resumes from the newest."""
    epochs: PositiveInt = 70
    """Passes over the training data. Learning-rate schedules span them or count them."""
    max_steps: PositiveInt | None = None
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
    accumulate: PositiveInt = 1
    """Gradient accumulation: steps per update of the weights."""
    log_every_steps: PositiveInt = 50
    """Steps between log lines. Apart from SyncBN and detection, only then does the host wait for
    the device."""
    save_every_steps: PositiveInt = 1000
    """Steps between checkpoints. Another one is written at the end of each epoch."""
    profile: NonNegativeInt = 0
    """Steps to profile, shortly after the start, into OUT/profile; 0 for none."""
    keep_checkpoints: Annotated[int, at_least(2)] = 3
    """How many of the newest checkpoints to keep, at least 2, besides the best one."""
    timeout: PositiveFloat = 1800.0
    """Seconds that a process waits for the others before the job fails."""
