"""Results and weights of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rotpred.training.checkpoint import CheckpointFolder


def results(out: Path) -> dict[str, dict[str, Any]]:
    """Rows of results.json by metric."""
    return {row["metric"]: row for row in json.loads((out / "results.json").read_text())}


def saved(out: Path) -> dict[str, torch.Tensor]:
    """State dict of the model in the newest checkpoint."""
    latest = CheckpointFolder(out / "checkpoints").latest()
    assert latest is not None
    model: dict[str, torch.Tensor] = latest.state["model"]
    return model
