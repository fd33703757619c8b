"""Rotation accuracy of a checkpoint's own head, ours or another project's."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from rotpred.distributed import Rank, check_equal
from rotpred.models.heads import make_rotnet
from rotpred.models.memory_format import channels_last
from rotpred.plots.training import confusion
from rotpred.protocols.run import open_folder
from rotpred.protocols.scoring import ROTATIONS, score_rotations
from rotpred.recipes.rotation import Rotation
from rotpred.training.data import open_data
from rotpred.training.precision import autocast
from rotpred.weights.frozen_backbone import RANDOM
from rotpred.weights.load import load_rotnet

logger = logging.getLogger(__name__)

_CLOCKWISE = {"file": None, "clockwise": True, "counter-clockwise": False}


def run(recipe: Rotation, rank: Rank) -> Path:
    """Compute exact accuracy over all four views of all images, write the run folder.

    Returns:
        The run folder.

    Raises:
        ValueError: The weights, data and recipe do not fit together.
        FileNotFoundError: There are no such data or weights.
    """
    if not recipe.weights:
        raise ValueError("name the weights to score: --weights FILE, with its rotation head")
    if recipe.val.views != "rotate4" or recipe.val.drop_last:
        raise ValueError("all four views of every image are needed: views rotate4, no drop_last")
    with open_folder(recipe, rank) as run:
        torch.manual_seed(recipe.val.seed)  # for random weights
        net, sha = make_rotnet(recipe.backbone), ""
        if recipe.weights != RANDOM:
            report = load_rotnet(net, Path(recipe.weights), clockwise=_CLOCKWISE[recipe.labels])
            sha = report.sha256
            logger.info("%s: %s", recipe.weights, report.summary())
        run.name_weights(recipe.weights, sha)
        net = channels_last(net, rank.device).eval()
        run.val = run.loaders.enter_context(open_data(recipe.val, rank, recipe.run.precision))
        check_equal(len(run.val), rank, what="steps in an epoch")

        def logits_of(images: torch.Tensor) -> torch.Tensor:
            with autocast(rank.device, recipe.run.precision):
                logits: torch.Tensor = net(images)
            return logits

        if run.start(len(run.val)):
            found = score_rotations(logits_of, run.val, rank, tick=run.log.tick)
            run.result("accuracy", found.accuracy, n=found.n, chance=100 / ROTATIONS)
            if rank.main:
                run.log.figure("confusion", confusion(torch.tensor(found.matrix)))
    return run.out
