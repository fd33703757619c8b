"""Load the frozen backbone that an evaluation starts from."""

from __future__ import annotations

import logging
from pathlib import Path

from rotpred.distributed import Rank, any_true
from rotpred.models.backbone import build_backbone
from rotpred.models.base import Backbone
from rotpred.models.memory_format import channels_last
from rotpred.weights.load import imagenet_file, read_backbone

logger = logging.getLogger(__name__)

RANDOM = "random"
"""Value of a recipe's `weights` for the control: the same network, untrained."""

IMAGENET = "imagenet"
"""Value of a recipe's `weights` for torchvision's, trained on ImageNet with labels."""


def load_frozen_backbone(name: str | None, weights: str | None, rank: Rank) -> tuple[Backbone, str]:
    """Return a frozen backbone in evaluation mode, and the SHA-256 of its weights ("" if random).

    Args:
        name: Architecture, one of `BACKBONES`; None if the file names it.
        weights: A file of any layout that `load_backbone` knows, or `RANDOM` or `IMAGENET`.
        rank: Its device gets the backbone.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No weights were named, or they do not fit (`CheckpointError`).
    """
    if not weights:
        raise ValueError(
            "name the weights to evaluate: --weights FILE (backbone.safetensors of a run), "
            "--weights random for the untrained control, or --weights imagenet for supervised ones"
        )
    path, sha = Path(weights), ""
    if weights in (RANDOM, IMAGENET):
        if name is None:
            raise ValueError(f"{weights} weights do not name their architecture: give --backbone")
        path = _supervised(name, rank) if weights == IMAGENET else path
        network = build_backbone(name)
    if weights != RANDOM:
        network, report = read_backbone(path, name)
        sha = report.sha256
        logger.info("%s: %s", weights, report.summary())
    network = channels_last(network, rank.device)
    # Stays in eval(): batch norm must use the trained statistics and must not update them.
    return network.eval().requires_grad_(False), sha


def _supervised(arch: str, rank: Rank) -> Path:
    """Return `imagenet_file`. One process per machine downloads; if one fails, all raise."""
    failure: ValueError | None = None
    if rank.local_rank == 0:
        try:
            imagenet_file(arch)
        except ValueError as error:
            failure = error
    if any_true(failure is not None, rank):
        raise failure or ValueError("another process could not get the supervised weights")
    return imagenet_file(arch)
