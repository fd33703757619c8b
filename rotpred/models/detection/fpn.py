"""Feature pyramid network (FPN) of Mask R-CNN."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from rotpred.models.resnet import ResNet

LEVELS = ("p2", "p3", "p4", "p5", "p6")
"""Names of the feature maps, from fine to coarse."""


class Pyramid(nn.Module):
    """P2 to P6 of 256 channels from res2 to res5 (Lin et al. 2017); P6 is every other pixel of P5.

    Every convolution is followed by batch norm without activation, as in mmselfsup's
    mask-rcnn_r50_fpn_ms-1x_coco.py and its detectron2 yaml. Convolutions are initialised with
    Kaiming uniform of slope 1 (detectron2's c2_xavier_fill).
    """

    channels = 256

    def __init__(self, backbone: ResNet) -> None:
        """Build the pyramid for the feature maps of this backbone."""
        super().__init__()
        self.strides = tuple(stride(backbone) * 2**k for k in range(len(LEVELS)))
        self.fpn = FeaturePyramidNetwork(
            list(backbone.stage_channels[1:]),
            self.channels,
            extra_blocks=LastLevelMaxPool(),
            norm_layer=nn.BatchNorm2d,
        )

    def forward(self, stages: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute P2 to P6 from the feature maps (B, C, h, w) of res2 to res5.

        Returns:
            Feature maps (B, 256, h, w) by name. P2 has the stride of res2, each next one twice that
            of the one before.
        """
        features = self.fpn(dict(zip(LEVELS, stages, strict=False)))
        return dict(zip(LEVELS, features.values(), strict=True))


def stride(backbone: ResNet) -> int:
    """Return the stride of res2 in pixels: 4, or less with a small stem.

    Each later stage has twice the stride of the one before it.
    """
    first = backbone.conv1
    assert isinstance(first, nn.Conv2d)
    return int(first.stride[0]) * (2 if isinstance(backbone.maxpool, nn.MaxPool2d) else 1)
