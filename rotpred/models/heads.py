"""Rotation heads, and pooling between the stages of a backbone and linear probes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from rotpred.models.backbone import build_backbone
from rotpred.models.base import Backbone

PROBE_DIM = 9216
"""Approximate length of the pooled features of every stage: 12*12*64. The RotNet authors' pools of
AlexNet (12/7/5/6/6) and mmselfsup's of ResNet-50 (12/6/4/3/2) all have the integer side nearest to
sqrt(9216 / channels)."""

RESNET50_POOLS = ((10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0))
"""Kernel, stride and padding of the average pools for stem to res5 of ResNet-50 at 224 pixels
(mmselfsup/models/utils/multi_pooling.py, and VISSL's linear evaluation): 9216, 9216, 8192, 9216 and
8192 features. The mean includes the padding, which matters for the stem."""


class PooledLinear(nn.Module):
    """Global average pooling and one linear layer."""

    def __init__(self, dim: int, *, classes: int) -> None:
        """Build the head with torch's default initialisation."""
        super().__init__()
        self.fc = nn.Linear(dim, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, dim, H, W) to logits (N, classes)."""
        logits: torch.Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class AlexNetHead(nn.Module):
    """Pool 5, fc6, fc7 and the classifier of the RotNet authors (architectures/AlexNet.py).

    fc6 and fc7 have BN and ReLU, no bias and no dropout. fc6 reads all 9216 = 256*6*6 values, so
    the feature map of conv5 must be 13x13 or 14x14 (images of 223 to 254 pixels).
    """

    def __init__(self, *, classes: int) -> None:
        """Build the head with torch's default initialisation."""
        super().__init__()
        self.pool5 = nn.MaxPool2d(3, stride=2)
        self.fc6 = nn.Linear(256 * 6 * 6, 4096, bias=False)
        self.bn6 = nn.BatchNorm1d(4096)
        self.fc7 = nn.Linear(4096, 4096, bias=False)
        self.bn7 = nn.BatchNorm1d(4096)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4096, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map conv5 (N, 256, 13, 13) to logits (N, classes)."""
        x = self.pool5(x).flatten(1)
        x = self.relu(self.bn6(self.fc6(x)))
        x = self.relu(self.bn7(self.fc7(x)))
        logits: torch.Tensor = self.fc(x)
        return logits


class RotNet(nn.Module):
    """A backbone and a head; the state dict has the prefixes `backbone.` and `head.`."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        """Combine them; the head reads the backbone's last feature map."""
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, 3, S, S) to logits (N, classes)."""
        logits: torch.Tensor = self.head(self.backbone(x))
        return logits


def make_rotnet(name: str, classes: int = 4) -> RotNet:
    """Build the network of the pretext task on the backbone `name`.

    ResNet: global average and Linear, initialised with N(0, 0.01) and bias 0 (mmselfsup
    models/heads/cls_head.py). NIN: the same with torch's default initialisation. AlexNet: fc6, fc7
    and the classifier. NIN and AlexNet follow the paper's code.

    Raises:
        ValueError: No backbone has this name.
    """
    backbone = build_backbone(name)
    if name == "alexnet":
        return RotNet(backbone, AlexNetHead(classes=classes))
    head = PooledLinear(backbone.dim, classes=classes)
    if name.startswith("resnet"):
        nn.init.normal_(head.fc.weight, std=0.01)
        nn.init.zeros_(head.fc.bias)
    return RotNet(backbone, head)


def stage_shapes(backbone: Backbone, input_size: int) -> list[tuple[int, int, int]]:
    """Return (channels, height, width) of each stage's feature map for a square input.

    Raises:
        ValueError: The input is too small for this backbone.
    """
    # A copy on the meta device, without storage: the original may be frozen, in training mode,
    # compiled or on a GPU.
    with torch.device("meta"):
        meta = build_backbone(backbone.arch).eval()
        image = torch.empty(1, 3, input_size, input_size)
    try:
        with torch.no_grad():
            features = meta.stages(image)
    except RuntimeError as error:
        raise ValueError(f"{input_size} pixels are too few for {backbone.arch}: {error}") from error
    return [(x.shape[1], x.shape[2], x.shape[3]) for x in features]


def stage_pools(backbone: Backbone, input_size: int) -> list[nn.Module]:
    """Return a pooling module per stage that leaves about `PROBE_DIM` values of its feature map.

    `RESNET50_POOLS` for ResNet-50 at 224 pixels. Else each pools to the side nearest to
    sqrt(PROBE_DIM / channels), at most that of the feature map: by maximum for AlexNet (the
    authors' and VISSL's probes), else by mean.

    Args:
        backbone: A backbone that `build_backbone` returned.
        input_size: Side of the input in pixels.

    Raises:
        ValueError: The input is too small for this backbone.
    """
    if backbone.arch == "resnet50" and input_size == 224:
        return [nn.AvgPool2d(k, stride=s, padding=p) for k, s, p in RESNET50_POOLS]
    pool = nn.AdaptiveMaxPool2d if backbone.arch == "alexnet" else nn.AdaptiveAvgPool2d
    return [
        pool(max(1, min(height, round(math.sqrt(PROBE_DIM / channels)))))
        for channels, height, _ in stage_shapes(backbone, input_size)
    ]


def pooled_dims(backbone: Backbone, input_size: int, pools: Sequence[nn.Module]) -> list[int]:
    """Return the number of values per image after each pool: the probes' input lengths."""
    shapes = stage_shapes(backbone, input_size)
    return [
        math.prod(pool(torch.empty(1, *shape, device="meta")).shape)
        for pool, shape in zip(pools, shapes, strict=True)
    ]
