"""How a run is driven, whatever it trains: a part of every recipe."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.spec import Precision


@dataclass(frozen=True)
class RunSettings:
    """How a run is driven, whatever it trains."""

    out: str = ""
    """Run folder; empty for runs/NAME. A folder with checkpoints is gone on with."""
    epochs: int = 70
    """Passes over the training data; schedules are stretched over them or count them."""
    max_steps: int | None = None
    """Stop after this many steps, with the schedule of the whole run (smoke runs, benchmarks)."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, or cuda."""
    precision: Precision = "bf16"
    """Autocast type: bf16, fp16 (with a gradient scaler) or fp32 (no autocast)."""
    compile: bool = False
    """torch.compile the network, once for each side of the images. Not with SyncBN."""
    cuda_graph: bool = False
    """Replay forward and backward as one CUDA graph for each side of the images: less work for a
    host that is late. Needs a GPU, and batch norm without SyncBN."""
    accumulate: int = 1
    """Steps whose gradients are added up before one update of the weights."""
    log_every_steps: int = 50
    """Steps between progress lines; apart from SyncBN and detection, the only times at which the
    host waits for the device."""
    save_every_steps: int = 1000
    """Steps between checkpoints; one more is written at the end of each epoch."""
    profile: int = 0
    """Steps to trace, shortly after the start, into OUT/profile; 0 for none."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept, at least 2, besides the best one."""
    timeout: float = 1800.0
    """Seconds that a process waits for its peers before the job is ended."""

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
