"""The channels_last memory format."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def channels_last(module: M, device: torch.device) -> M:
    """Move a network to its device, weights laid out for channels_last convolutions."""
    return module.to(device).to(memory_format=torch.channels_last)
