"""Rotation accuracy of a checkpoint's own head, ours or another project's."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import torch

from pipelines.storage import write_json
from rotpred.distributed import Rank, check_equal
from rotpred.models.heads import make_rotnet
from rotpred.models.memory_format import channels_last
from rotpred.plots.training import confusion
from rotpred.protocols.scoring import ROTATIONS, score_rotations
from rotpred.recipes.rotation import Rotation
from rotpred.records.folder import DONE
from rotpred.records.log import RunLog, lock
from rotpred.training.data import open_data
from rotpred.training.settings import RunSettings
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
    out = Path(recipe.run.out or f"runs/{recipe.name}")
    torch.manual_seed(recipe.val.seed)  # for the random control's weights
    with contextlib.ExitStack() as stack:
        if rank.main:
            stack.enter_context(lock(out, recipe.name))
        net, sha = make_rotnet(recipe.backbone), ""
        if recipe.weights != RANDOM:
            report = load_rotnet(net, Path(recipe.weights), clockwise=_CLOCKWISE[recipe.labels])
            sha = report.sha256
            logger.info("%s: %s", recipe.weights, report.summary())
        net = channels_last(net, rank.device).eval()
        loader = stack.enter_context(
            open_data(recipe.val, rank, RunSettings(precision=recipe.run.precision))
        )
        check_equal(len(loader), rank, what="steps in an epoch")
        log = stack.enter_context(
            RunLog(
                out,
                recipe=recipe,
                rank_main=rank.main,
                world=rank.world,
                total_steps=len(loader),
                device=str(rank.device),
            )
        )
        found = score_rotations(net, loader, rank, recipe.run.precision, tick=log.tick)
        log.result(
            recipe.name,
            metric="accuracy",
            value=100 * found.accuracy,
            unit="%",
            n=found.n,
            checkpoint_sha256=sha or None,
            weights=Path(recipe.weights).name,
            chance=100 / ROTATIONS,
        )
        if rank.main:
            log.figure("confusion", confusion(torch.tensor(found.matrix)))
            write_json(out / DONE, {"weights": sha, "val": loader.data_id})
    return out
