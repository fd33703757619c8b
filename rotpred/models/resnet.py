"""ResNets with named stages."""

from __future__ import annotations

from typing import Literal

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from rotpred.models.base import Backbone


class ResNet(Backbone, torchvision.models.ResNet):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's ResNet without `fc`: same keys, same outputs, stride in the 3x3 convolution.

    Stages: stem (conv1 + BN + ReLU, before the max pool), res2 to res5 (torchvision's layer1 to
    layer4). Named stages avoid confusion between counting from 0 and from 1. Convolutions are
    initialised with Kaiming normal (fan out, ReLU), BN with weight 1, as in mmselfsup
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
        """Build the network with random weights.

        Args:
            block: torchvision's BasicBlock (ResNet-18) or Bottleneck (ResNet-50).
            layers: Number of blocks in res2 to res5.
            stem: "imagenet" is 7x7 of stride 2 and a max pool. The small ones, for images of about
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
        """Return the feature maps of stem, res2, res3, res4 and res5, each (N, C, H, W).

        At 224 pixels ResNet-50 has 64x112x112, 256x56x56, 512x28x28, 1024x14x14, 2048x7x7.
        """
        stem = self.relu(self.bn1(self.conv1(x)))
        res2 = self.layer1(self.maxpool(stem))
        res3 = self.layer2(res2)
        res4 = self.layer3(res3)
        return [stem, res2, res3, res4, self.layer4(res4)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the feature map of res5, (N, dim, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        last: torch.Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return last
