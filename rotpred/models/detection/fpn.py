"""The pyramid of maps below Mask R-CNN."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from rotpred.models.resnet import ResNet

LEVELS = ("p2", "p3", "p4", "p5", "p6")
"""Names of the maps, from fine to coarse."""


class Pyramid(nn.Module):
    """P2 to P6 of 256 channels from res2 to res5 (Lin et al. 2017); P6 is every other pixel of P5.

    Every convolution is followed by batch norm and no activation, as both mmselfsup's
    mask-rcnn_r50_fpn_ms-1x_coco.py and its detectron2 yaml have it. Convolutions start from
    Kaiming's uniform with slope 1 (detectron2's c2_xavier_fill).
    """

    channels = 256

    def __init__(self, backbone: ResNet) -> None:
        """For maps of this backbone."""
        super().__init__()
        self.strides = tuple(stride(backbone) * 2**k for k in range(len(LEVELS)))
        self.fpn = FeaturePyramidNetwork(
            list(backbone.stage_channels[1:]),
            self.channels,
            extra_blocks=LastLevelMaxPool(),
            norm_layer=nn.BatchNorm2d,
        )

    def forward(self, stages: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Maps by name, from those of res2 to res5."""
        maps = self.fpn(dict(zip(LEVELS, stages, strict=False)))
        return dict(zip(LEVELS, maps.values(), strict=True))


def stride(backbone: ResNet) -> int:
    """Pixels from one place of the map of res2 to the next: 4, or less with a small stem.

    Each later stage has twice that of the one before it.
    """
    first = backbone.conv1
    assert isinstance(first, nn.Conv2d)
    return int(first.stride[0]) * (2 if isinstance(backbone.maxpool, nn.MaxPool2d) else 1)
