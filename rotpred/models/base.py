"""The interface of a backbone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Backbone(nn.Module):
    """What the protocols rely on. Inputs are float (N, 3, S, S), channels_last or not."""

    arch: str
    """The name that `build_backbone` made it by; weights files carry it."""
    stage_names: tuple[str, ...]
    stage_channels: tuple[int, ...]

    @property
    def dim(self) -> int:
        """Channels of the last map, the length D of `pooled`."""
        return self.stage_channels[-1]

    def stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return one map (N, C, H, W) per stage, after its last ReLU, in forward order."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last map (N, dim, H, W) alone, so that the others can be freed."""
        raise NotImplementedError

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """Return the global average of the last map, (N, dim)."""
        return F.adaptive_avg_pool2d(self(x), 1).flatten(1)
