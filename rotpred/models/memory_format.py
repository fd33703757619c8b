"""The channels_last memory format."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def channels_last(module: M, device: torch.device) -> M:
    """Move a network to the device and convert its weights to channels_last."""
    return module.to(device).to(memory_format=torch.channels_last)
