"""The networks: ResNet, the RotNet authors' AlexNet, and network-in-network.

All of them give their stages as a list of maps, which the probes of linear evaluation read. What
sits on top (rotation heads, probe pooling) is in `heads.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

BACKBONES = (
    "resnet18",
    "resnet50",
    "resnet18_small",
    "resnet18_tiny",
    "alexnet",
    "nin3",
    "nin4",
    "nin5",
)
"""The names that `build_backbone` knows."""


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


class ResNet(Backbone, torchvision.models.ResNet):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's ResNet without `fc`: same keys, same values, stride in the 3x3 convolution.

    Stages: stem (conv1 + BN + ReLU, before the max pool), res2 to res5 (torchvision's layer1 to
    layer4). The names avoid counting from zero here and from one there. Convolutions start from
    Kaiming's normal (fan out, ReLU), BN from weight 1, as in mmselfsup
    (mmselfsup/models/backbones/resnet.py).
    """

    stage_names = ("stem", "res2", "res3", "res4", "res5")
    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        *,
        stem: Literal["imagenet", "small_stride1", "small_stride2", "small_pooled"] = "imagenet",
    ) -> None:
        """Build it.

        Args:
            block: torchvision's BasicBlock (ResNet-18) or Bottleneck (ResNet-50).
            layers: number of blocks in res2 to res5.
            stem: "imagenet" is 7x7 stride 2 and a max pool; the small ones, for pictures of about
                32 pixels, are 3x3: stride 1 or 2 without max pool, or stride 2 with it.
        """
        super().__init__(block, list(layers))
        del self.fc
        if stem != "imagenet":
            stride = 1 if stem == "small_stride1" else 2
            conv1 = nn.Conv2d(3, 64, 3, stride=stride, padding=1, bias=False)
            nn.init.kaiming_normal_(conv1.weight, mode="fan_out", nonlinearity="relu")
            self.conv1 = conv1
            if stem != "small_pooled":
                self.maxpool = nn.Identity()
        self.stage_channels = (64, *(width * block.expansion for width in (64, 128, 256, 512)))

    def stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the maps of stem, res2, res3, res4 and res5.

        At 224 pixels ResNet-50 gives 64x112x112, 256x56x56, 512x28x28, 1024x14x14, 2048x7x7.
        """
        stem = self.relu(self.bn1(self.conv1(x)))
        res2 = self.layer1(self.maxpool(stem))
        res3 = self.layer2(res2)
        res4 = self.layer3(res3)
        return [stem, res2, res3, res4, self.layer4(res4)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the map of res5."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        last: torch.Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return last


class AlexNet(Backbone):
    """The five convolutions of the RotNet authors' AlexNet (architectures/AlexNet.py).

    Every convolution keeps its bias and is followed by BN and ReLU; no local response
    normalisation, groups or dropout. The max pools (3, stride 2) stand between stages, after
    conv1 and conv2; the one after conv5 belongs to the rotation head. Stages are the maps before
    their pool, as the authors' linear probes read them: 64x55x55, 192x27x27, 384x13x13, 256x13x13,
    256x13x13 at 224 pixels.
    """

    stage_names = ("conv1", "conv2", "conv3", "conv4", "conv5")
    stage_channels = (64, 192, 384, 256, 256)

    def __init__(self) -> None:
        """Build it with torch's default initialisation, as the authors did."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 11, stride=4, padding=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 192, 5, padding=2)
        self.bn2 = nn.BatchNorm2d(192)
        self.conv3 = nn.Conv2d(192, 384, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(384)
        self.conv4 = nn.Conv2d(384, 256, 3, padding=1)
        self.bn4 = nn.BatchNorm2d(256)
        self.conv5 = nn.Conv2d(256, 256, 3, padding=1)
        self.bn5 = nn.BatchNorm2d(256)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, stride=2)

    def stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the maps of conv1 to conv5, each after BN and ReLU and before any pool."""
        conv1 = self.relu(self.bn1(self.conv1(x)))
        conv2 = self.relu(self.bn2(self.conv2(self.pool(conv1))))
        conv3 = self.relu(self.bn3(self.conv3(self.pool(conv2))))
        conv4 = self.relu(self.bn4(self.conv4(conv3)))
        conv5 = self.relu(self.bn5(self.conv5(conv4)))
        return [conv1, conv2, conv3, conv4, conv5]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the map of conv5, before its pool."""
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        x = self.pool(self.relu(self.bn2(self.conv2(x))))
        x = self.relu(self.bn3(self.conv3(x)))
        x = self.relu(self.bn4(self.conv4(x)))
        x = self.relu(self.bn5(self.conv5(x)))
        return x


class NIN(Backbone):
    """Network-in-network of the RotNet authors (architectures/NetworkInNetwork.py), for CIFAR-10.

    A block is three convolutions (the first 5x5 or 3x3, then 1x1 twice, without bias), each with BN
    and ReLU. Blocks 1 and 2 end in a pool, which is part of the stage: 96x16x16, 192x8x8 and
    192x8x8 from there on, at 32 pixels. No pool after block 3, as in the authors' rotation
    configurations (`use_avg_on_conv3=False`). torch's default initialisation: theirs is never
    called.
    """

    def __init__(self, blocks: int = 4) -> None:
        """Build it with 3, 4 or 5 blocks."""
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
        """Return one map per block, pooled where the block ends in a pool."""
        maps = []
        for block in self.children():
            x = block(x)
            maps.append(x)
        return maps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the map of the last block."""
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


def build_backbone(name: str) -> Backbone:
    """Build a randomly initialised backbone by its name, one of `BACKBONES`.

    resnet18_small is for 32 pixels: 3x3 stem of stride 2, no max pool. resnet18_tiny keeps the
    max pool: a quarter of the work, for a CPU. nin3, nin4 and nin5 have as
    many blocks.

    Raises:
        ValueError: no backbone has this name.
    """
    backbone: Backbone
    match name:
        case "resnet18":
            backbone = ResNet(BasicBlock, (2, 2, 2, 2))
        case "resnet50":
            backbone = ResNet(Bottleneck, (3, 4, 6, 3))
        case "resnet18_tiny":
            backbone = ResNet(BasicBlock, (2, 2, 2, 2), stem="small_pooled")
        case "resnet18_small":
            backbone = ResNet(BasicBlock, (2, 2, 2, 2), stem="small_stride2")
        case "alexnet":
            backbone = AlexNet()
        case "nin3" | "nin4" | "nin5":
            backbone = NIN(int(name[-1]))
        case _:
            raise ValueError(f"unknown backbone {name!r}: expected one of {', '.join(BACKBONES)}")
    backbone.arch = name
    return backbone
