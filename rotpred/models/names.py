"""Names of the backbones and of their stages, for recipes. Imports no torch."""

from __future__ import annotations

from typing import Final, Literal

BackboneName = Literal[
    "resnet18", "resnet50", "resnet18_small", "resnet18_tiny", "alexnet", "nin3", "nin4", "nin5"
]
"""Backbones that `rotpred.models.backbone.build_backbone` builds."""

AVGPOOL: Final = "avgpool"
"""Name of the global average of the last feature map, used like the name of a stage."""

StageName = Literal[
    "stem", "res2", "res3", "res4", "res5", "conv1", "conv2", "conv3", "conv4", "conv5", "avgpool"
]
"""Stages: stem to res5 of ResNets, conv1 to conv5 of AlexNet, conv1 to convN of ninN, avgpool."""
