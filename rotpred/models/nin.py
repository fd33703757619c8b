"""The RotNet paper's Network in Network for CIFAR-10."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from rotpred.models.base import Backbone


class NIN(Backbone):
    """Network-in-network of the RotNet authors (architectures/NetworkInNetwork.py), for CIFAR-10.

    A block is three convolutions (the first 5x5 or 3x3, then 1x1 twice, without bias), each with BN
    and ReLU. Blocks 1 and 2 end in a pool, which is part of the stage. At 32 pixels the stages are
    96x16x16, then 192x8x8. There is no pool after block 3, as in the authors' rotation
    configurations (`use_avg_on_conv3=False`). Weights have torch's default initialisation, because
    the authors' code never calls theirs.
    """

    def __init__(self, blocks: int = 4) -> None:
        """Build the network with 3, 4 or 5 blocks.

        Raises:
            ValueError: `blocks` is another number.
        """
        super().__init__()
        if blocks not in (3, 4, 5):
            raise ValueError(f"a NIN has 3, 4 or 5 blocks, not {blocks}")
        self.stage_names = tuple(f"conv{k}" for k in range(1, blocks + 1))
        self.stage_channels = (96, *[192] * (blocks - 1))
        self.block1 = _nin_block(3, (192, 160, 96), 5, pool=nn.MaxPool2d(3, stride=2, padding=1))
        self.block2 = _nin_block(96, (192, 192, 192), 5, pool=nn.AvgPool2d(3, stride=2, padding=1))
        for k in range(3, blocks + 1):
            self.add_module(f"block{k}", _nin_block(192, (192, 192, 192), 3))

    def stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return one feature map (N, C, H, W) per block, after the block's pool if it has one."""
        features = []
        for block in self.children():
            x = block(x)
            features.append(x)
        return features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the feature map of the last block, (N, 192, H, W)."""
        for block in self.children():
            x = block(x)
        return x


def _nin_block(
    inputs: int, widths: tuple[int, int, int], kernel: int, *, pool: nn.Module | None = None
) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for k, width in enumerate(widths, start=1):
        size = kernel if k == 1 else 1
        layers[f"conv{k}"] = nn.Conv2d(inputs, width, size, padding=size // 2, bias=False)
        layers[f"bn{k}"] = nn.BatchNorm2d(width)
        layers[f"relu{k}"] = nn.ReLU(inplace=True)
        inputs = width
    if pool is not None:
        layers["pool"] = pool
    return nn.Sequential(layers)
