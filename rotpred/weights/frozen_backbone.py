"""The frozen backbone that evaluations start from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

from rotpred.distributed import Rank, any_true
from rotpred.models.backbone import build_backbone
from rotpred.models.base import Backbone
from rotpred.models.memory_format import channels_last
from rotpred.weights.load import imagenet_file, load_backbone

logger = logging.getLogger(__name__)

RANDOM = "random"
"""Value of a recipe's `weights` for the control: the same network, untrained."""

IMAGENET = "imagenet"
"""Value of a recipe's `weights` for torchvision's, trained on ImageNet with its labels."""


class HasWeights(Protocol):
    """What recipes that evaluate weights have in common."""

    @property
    def name(self) -> str:
        """Names the run in results and in the default run folder."""

    @property
    def weights(self) -> str:
        """What `load_frozen_backbone` reads."""

    @property
    def backbone(self) -> str:
        """The architecture of the weights."""


def load_frozen_backbone(name: str, weights: str, rank: Rank) -> tuple[Backbone, str]:
    """A frozen backbone in evaluation mode, and the checksum of its weights ("" for random ones).

    Raises:
        ValueError: no weights were named, or they do not fit (`CheckpointError`), in words.
    """
    if not weights:
        raise ValueError(
            "name the weights to evaluate: --weights FILE (backbone.safetensors of a run), "
            "--weights random for the untrained control, or --weights imagenet for supervised ones"
        )
    network = build_backbone(name)
    sha = ""
    if weights != RANDOM:
        path = _supervised(name, rank) if weights == IMAGENET else Path(weights)
        report = load_backbone(network, path)
        sha = report.sha256
        logger.info("%s: %s", weights, report.words())
    network = channels_last(network, rank.device)
    # eval() for good: batch norm must use the trained statistics and must not move them.
    return network.eval().requires_grad_(False), sha


def _supervised(arch: str, rank: Rank) -> Path:
    """`imagenet_file`, where one process of each machine downloads; none goes on alone."""
    failure: ValueError | None = None
    if rank.local_rank == 0:
        try:
            imagenet_file(arch)
        except ValueError as error:
            failure = error
    if any_true(failure is not None, rank):
        raise failure or ValueError("another process has no supervised weights")
    return imagenet_file(arch)
