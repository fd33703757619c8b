"""Fully convolutional network (FCN) for segmentation: a dilated ResNet and two heads.

FCN-R50-d8 of mmsegmentation (configs/_base_/models/fcn_r50-d8.py) on our backbone, whose stem is a
plain 7x7 convolution.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from rotpred.models.base import Backbone
from rotpred.models.resnet import ResNet


def dilate(backbone: Backbone) -> ResNet:
    """Replace the strides of res4 and res5 by dilation, in place, so that they keep res3's size.

    Strides become (1, 2, 1, 1) and dilations (1, 1, 2, 4). The first 3x3 convolution of a dilated
    stage, which loses its stride, has the dilation of its input (1 in res4, 2 in res5). For a
    Bottleneck this equals torchvision's `replace_stride_with_dilation` and mmsegmentation's
    `contract_dilation`. Every fourth value of res5 then equals the strided network's; this holds
    for BasicBlock as well.

    Returns:
        The same backbone; its output stride is 8 if its stem has stride 4.

    Raises:
        ValueError: The backbone is not a ResNet.
    """
    if not isinstance(backbone, ResNet):
        raise ValueError(f"{backbone.arch} cannot be dilated: segmentation needs a ResNet backbone")
    for k, stage in enumerate((backbone.layer3, backbone.layer4)):
        rates = itertools.chain([2**k], itertools.repeat(2 ** (k + 1)))
        for conv in stage.modules():
            if isinstance(conv, nn.Conv2d):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    rate = next(rates)
                    conv.dilation = conv.padding = (rate, rate)
    return backbone


class FcnHead(nn.Module):
    """3x3 convolutions with BN and ReLU, dropout of whole channels, and a 1x1 classifier.

    Source: mmseg/models/decode_heads/fcn_head.py and decode_head.py. Convolutions have no bias and
    are initialised with Kaiming normal (fan out, ReLU); the classifier with N(0, 0.01) and bias 0.
    """

    def __init__(
        self, inputs: int, channels: int, classes: int, *, convs: int, concat: bool, dropout: float
    ) -> None:
        """Build the head.

        Args:
            inputs: Channels of the input feature map.
            channels: Channels of the convolutions.
            classes: Channels of the logits.
            convs: Number of convolutions.
            concat: Add a convolution on the input and the last output, concatenated.
            dropout: Probability of dropping a channel before the classifier.
        """
        super().__init__()
        widths = [inputs, *[channels] * convs]
        self.convs = nn.Sequential(*(_conv(a, b) for a, b in itertools.pairwise(widths)))
        self.concat = _conv(inputs + channels, channels) if concat else None
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]  # it has a bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, inputs, h, w) to logits (B, classes, h, w)."""
        features = self.convs(x)
        if self.concat is not None:
            features = self.concat(torch.cat([x, features], dim=1))
        logits: torch.Tensor = self.classifier(self.dropout(features))
        return logits


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Fcn(nn.Module):
    """Dilated ResNet with a decode head on res5 (two convolutions of 512, concatenated input) and,
    in training, an auxiliary head on res4 (one convolution of 256)."""

    def __init__(self, backbone: Backbone, classes: int, *, dropout: float = 0.1) -> None:
        """Build the network on a ResNet, which is dilated in place.

        Raises:
            ValueError: The backbone is not a ResNet.
        """
        super().__init__()
        self.backbone = dilate(backbone)
        *_, res4, res5 = backbone.stage_channels
        self.decode = FcnHead(res5, 512, classes, convs=2, concat=True, dropout=dropout)
        self.auxiliary = FcnHead(res4, 256, classes, convs=1, concat=False, dropout=dropout)

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Map images (B, 3, H, W) to logits (B, classes, H / 8, W / 8), rounded up.

        In training, return a pair: logits of the decode head and of the auxiliary head.
        """
        if not self.training:
            logits: torch.Tensor = self.decode(self.backbone(images))
            return logits
        *_, res4, res5 = self.backbone.stages(images)
        return self.decode(res5), self.auxiliary(res4)


def resize_logits(
    logits: torch.Tensor, size: tuple[int, int], *, align_corners: bool
) -> torch.Tensor:
    """Resize logits (B, classes, h, w) to `size` (height, width), bilinear, in float32."""
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners)


def pixel_loss(logits: torch.Tensor, masks: torch.Tensor, ignored: int) -> torch.Tensor:
    """Return the cross entropy of logits (B, classes, H, W) and masks int64 (B, H, W), a scalar.

    The mean is over all pixels; the `ignored` ones add 0 to it. This is the default of
    mmsegmentation (`avg_non_ignore` is off, mmseg/models/losses/cross_entropy_loss.py), and was
    used for the published results.
    """
    return F.cross_entropy(logits, masks, ignore_index=ignored, reduction="sum") / masks.numel()
