"""What a finished run left in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rotpred.training.checkpoint import load_latest


def results(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of results.json by their metric."""
    return {row["metric"]: row for row in json.loads((out / "results.json").read_text())}


def saved(out: Path) -> dict[str, torch.Tensor]:
    """The model of the newest checkpoint."""
    latest = load_latest(out / "checkpoints")
    assert latest is not None
    model: dict[str, torch.Tensor] = latest.state["model"]
    return model
