"""Pretraining by rotation prediction (Gidaris et al., ICLR 2018)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pipelines.batch import Batch
from pipelines.loader import Loader
from rotpred.distributed import Rank
from rotpred.models.heads import RotNet, make_rotnet
from rotpred.models.memory_format import channels_last
from rotpred.plots.training import confusion, filters, views_grid
from rotpred.protocols.run import Run, open_run
from rotpred.protocols.scoring import ROTATIONS, Validation, score_rotations
from rotpred.recipes.pretrain import Pretrain
from rotpred.training.data import check_views, open_data
from rotpred.training.state import LossAndLogs, OptimizedPart, TrainState
from rotpred.training.sync_bn import convert_sync_bn
from rotpred.weights.load import save_backbone

logger = logging.getLogger(__name__)


def run(recipe: Pretrain, rank: Rank) -> Path:
    """Train, validate and write the run folder. Resumes if the folder has checkpoints.

    Returns:
        The run folder. It has backbone.safetensors once the last epoch is done.

    Raises:
        ValueError: The recipe, the data and the machine do not fit together.
        Stopped: A signal ended the run after a checkpoint.
    """
    check_views("rotate4", recipe.train, recipe.val)
    with open_run(recipe, rank, open_data) as run:
        model = convert_sync_bn(make_rotnet(recipe.backbone), recipe.sync_bn, rank, recipe.run)
        model = channels_last(model, rank.device).train()
        state = run.train_state(
            model,
            [OptimizedPart(model, recipe.optim, recipe.schedule)],
            sync_bn=recipe.sync_bn,
            optim=recipe.optim,
            schedule=recipe.schedule,
        )
        if run.resume(state):
            images = recipe.train.batch_size * rank.world
            logger.info(
                "%s: %s on %s x %d, engine %s, %d images = %d views a step, %d steps",
                recipe.name, recipe.backbone, rank.device.type, rank.world, run.train.engine,
                images, ROTATIONS * images, run.total,
            )  # fmt: skip

            def draw_views(batch: Batch) -> None:
                normalize = recipe.train.normalize
                grid = views_grid(batch.images, targets=batch.targets, normalize=normalize)
                run.log.figure("views", grid)

            found = run.fit(
                state,
                rotation_objective(state),
                None if recipe.val is None else lambda: evaluate(state, run.val),
                first=draw_views,
            )
            if rank.main:
                _write_results(run, state, model, found)
    return run.out


def rotation_objective(state: TrainState) -> Callable[[Batch], LossAndLogs]:
    """Return the loss of a batch of rotated views: cross entropy over the four rotations."""

    def objective(batch: Batch) -> LossAndLogs:
        with state.autocast():
            logits = state.model(batch.images)
            loss = cross_entropy(logits, batch.targets)
        hits = (logits.argmax(1) == batch.targets).sum() / batch.valid.sum()
        return loss, {"loss": loss, "accuracy": 100 * hits}

    return objective


def evaluate(state: TrainState, val: Loader) -> Validation:
    """Return the rotation accuracy over the whole validation set, for any world size."""

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        with state.autocast():
            logits: torch.Tensor = state.module(images)
        return logits

    found = score_rotations(logits_of, val, state.rank)
    results = {"accuracy": found.accuracy}
    figures = {"confusion": confusion(torch.tensor(found.matrix))} if state.rank.main else {}
    return Validation(results, found.n, found.accuracy, logged=results, figures=figures)


def _write_results(
    run: Run[Loader], state: TrainState, model: RotNet, found: Validation | None
) -> None:
    """Write weights, results and figures."""
    meta = {"recipe": run.recipe.name, "step": str(state.step), "data": run.train.data_id}
    sha = save_backbone(run.out / "backbone.safetensors", model.backbone, meta)
    if found is not None:
        run.log.result(
            "rotation",
            metric="accuracy",
            value=100 * found.results["accuracy"],
            unit="%",
            n=found.n,
            checkpoint_sha256=sha,
            chance=100 / ROTATIONS,
            stream_digest=state.digest,
        )
    conv = next(m for m in model.backbone.modules() if isinstance(m, nn.Conv2d))
    run.log.figure("filters", filters(conv.weight.detach().float().cpu()))
