"""The RotNet paper's AlexNet."""

from __future__ import annotations

import torch
from torch import nn

from rotpred.models.base import Backbone


class AlexNet(Backbone):
    """The five convolutions of the RotNet authors' AlexNet (architectures/AlexNet.py).

    Every convolution has a bias and is followed by BN and ReLU. There are no local response
    normalisation, groups or dropout. The max pools (3, stride 2) are between stages, after conv1
    and conv2; the one after conv5 belongs to the rotation head. Stages are the feature maps before
    their pool, as in the authors' linear probes: 64x55x55, 192x27x27, 384x13x13, 256x13x13,
    256x13x13 at 224 pixels.
    """

    stage_names = ("conv1", "conv2", "conv3", "conv4", "conv5")
    stage_channels = (64, 192, 384, 256, 256)

    def __init__(self) -> None:
        """Build the network with torch's default initialisation, as the authors did."""
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
        """Return the feature maps (N, C, H, W) of conv1 to conv5: after ReLU, before pooling."""
        conv1 = self.relu(self.bn1(self.conv1(x)))
        conv2 = self.relu(self.bn2(self.conv2(self.pool(conv1))))
        conv3 = self.relu(self.bn3(self.conv3(self.pool(conv2))))
        conv4 = self.relu(self.bn4(self.conv4(conv3)))
        conv5 = self.relu(self.bn5(self.conv5(conv4)))
        return [conv1, conv2, conv3, conv4, conv5]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the feature map of conv5, (N, 256, H, W), before its pool."""
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        x = self.pool(self.relu(self.bn2(self.conv2(x))))
        x = self.relu(self.bn3(self.conv3(x)))
        x = self.relu(self.bn4(self.conv4(x)))
        x = self.relu(self.bn5(self.conv5(x)))
        return x
