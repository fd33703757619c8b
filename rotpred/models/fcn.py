"""The fully convolutional network for segmentation: a dilated ResNet and two heads.

FCN-R50-d8 of mmsegmentation (configs/_base_/models/fcn_r50-d8.py), over our backbone: its stem is
the plain 7x7 one.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from rotpred.models.base import Backbone
from rotpred.models.resnet import ResNet


def dilate(backbone: Backbone) -> ResNet:
    """Replace the strides of res4 and res5 by dilation, in place: their maps have res3's size.

    Strides become (1, 2, 1, 1) and dilations (1, 1, 2, 4). The first 3x3 convolution of a dilated
    stage, which loses its stride, has the rate of its input (1 in res4, 2 in res5): for a
    Bottleneck that is torchvision's `replace_stride_with_dilation` and mmsegmentation's
    `contract_dilation`. Every fourth value of res5 is then the strided network's, for BasicBlock
    as well.

    Returns:
        The backbone, of output stride 8 where its stem has stride 4.

    Raises:
        ValueError: it is no ResNet.
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

    Source: mmseg/models/decode_heads/fcn_head.py and decode_head.py. Convolutions start from
    Kaiming's normal (fan out, ReLU) and have no bias; the classifier from N(0, 0.01) and 0.
    """

    def __init__(
        self, inputs: int, channels: int, classes: int, *, convs: int, concat: bool, dropout: float
    ) -> None:
        """Build it.

        Args:
            inputs: channels of the map.
            channels: width of the convolutions.
            classes: channels of the logits.
            convs: number of convolutions.
            concat: one more, on the map and the last convolution's result together.
            dropout: probability that a channel of the last result is dropped.
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
    """A decode head on res5 (two convolutions of 512, concatenated input) and, in training, an
    auxiliary one on res4 (one of 256)."""

    def __init__(self, backbone: Backbone, classes: int, *, dropout: float = 0.1) -> None:
        """Take over a ResNet, which is dilated in place.

        Raises:
            ValueError: the backbone is no ResNet.
        """
        super().__init__()
        self.backbone = dilate(backbone)
        *_, res4, res5 = backbone.stage_channels
        self.decode = FcnHead(res5, 512, classes, convs=2, concat=True, dropout=dropout)
        self.auxiliary = FcnHead(res4, 256, classes, convs=1, concat=False, dropout=dropout)

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Map images (B, 3, H, W) to logits (B, classes, H / 8, W / 8), rounded up.

        In training a pair: the decode head's and the auxiliary head's.
        """
        if not self.training:
            logits: torch.Tensor = self.decode(self.backbone(images))
            return logits
        *_, res4, res5 = self.backbone.stages(images)
        return self.decode(res5), self.auxiliary(res4)


def resized(logits: torch.Tensor, size: tuple[int, int], *, align_corners: bool) -> torch.Tensor:
    """Logits (B, classes, h, w) at another height and width, bilinear, in float32."""
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners)


def pixel_loss(logits: torch.Tensor, masks: torch.Tensor, ignored: int) -> torch.Tensor:
    """Cross entropy of logits (B, classes, H, W) with classes int64 (B, H, W), a scalar.

    The mean is over all pixels; the `ignored` ones add 0 to it. So it is in mmsegmentation, whose
    `avg_non_ignore` is off by default (mmseg/models/losses/cross_entropy_loss.py), and in the
    published results.
    """
    return F.cross_entropy(logits, masks, ignore_index=ignored, reduction="sum") / masks.numel()
