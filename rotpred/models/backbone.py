"""Backbones by name: ResNet, the RotNet authors' AlexNet, and network-in-network.

Each returns its stages as a list of feature maps, for linear probes. Rotation heads and the pooling
of the probes are in `heads.py`.
"""

from __future__ import annotations

from typing import get_args

from torchvision.models.resnet import BasicBlock, Bottleneck

from rotpred.models.alexnet import AlexNet
from rotpred.models.base import Backbone
from rotpred.models.names import BackboneName
from rotpred.models.nin import NIN
from rotpred.models.resnet import ResNet

BACKBONES: tuple[str, ...] = get_args(BackboneName)
"""Names that `build_backbone` accepts."""


def build_backbone(name: str) -> Backbone:
    """Build a randomly initialised backbone by its name, one of `BACKBONES`.

    resnet18_small is for 32 pixels: 3x3 stem of stride 2, no max pool. resnet18_tiny keeps the max
    pool: a quarter of the work, for a CPU. nin3, nin4 and nin5 have 3, 4 and 5 blocks.

    Raises:
        ValueError: No backbone has this name.
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
