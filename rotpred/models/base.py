"""The interface of a backbone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Backbone(nn.Module):
    """Base class of the backbones. Inputs are float (N, 3, S, S), channels_last or not."""

    arch: str
    """The name given to `build_backbone`; weight files hold it."""
    stage_names: tuple[str, ...]
    stage_channels: tuple[int, ...]

    @property
    def dim(self) -> int:
        """Channels of the last feature map."""
        return self.stage_channels[-1]

    def stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return one feature map (N, C, H, W) per stage, after its last ReLU, in forward order."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return only the last feature map (N, dim, H, W), so that the others can be freed."""
        raise NotImplementedError

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """Return the global average of the last feature map, (N, dim)."""
        return F.adaptive_avg_pool2d(self(x), 1).flatten(1)
