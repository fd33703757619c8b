"""Pretraining by rotation prediction (Gidaris et al., ICLR 2018)."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pipelines.loader import Loader
from rotpred.distributed import Rank
from rotpred.metrics.classification import ConfusionResult
from rotpred.models.base import Backbone
from rotpred.models.heads import RotNet, make_rotnet
from rotpred.models.memory_format import channels_last
from rotpred.plots.training import confusion, curves, filters, views_grid
from rotpred.protocols.scoring import ROTATIONS, score_rotations
from rotpred.protocols.session import Job, open_job
from rotpred.recipes.pretrain import Pretrain
from rotpred.records.log import RunLog, read_rows
from rotpred.training.loop import steps
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
    with open_job(recipe, rank, views="rotate4") as job:
        model = _network(recipe, rank)
        state = job.train_state(
            model,
            [OptimizedPart(model, recipe.optim, recipe.schedule)],
            backbone=recipe.backbone,
            sync_bn=recipe.sync_bn,
            optim=asdict(recipe.optim),
            schedule={"kind": type(recipe.schedule).__name__, **asdict(recipe.schedule)},
        )
        with job.begin(state) as log:
            if log is not None:
                _announce(recipe, job)
                result = _train(recipe, state, job, log)
                if result is None and job.val is not None:  # max_steps ended it mid-epoch
                    result = evaluate(state, job.val, recipe)
                _finish(recipe, state, job, result, log)
    return job.out


def _train(
    recipe: Pretrain, state: TrainState, job: Job[Loader], log: RunLog
) -> ConfusionResult | None:
    """Train to the end. Return the last validation, if it is of the final weights."""
    results: dict[int, ConfusionResult] = {}

    def validate(_finished: int) -> float:
        assert job.val is not None
        result = results[state.step] = evaluate(state, job.val, recipe)
        log.validation(step=state.step, values={"accuracy": 100 * result.accuracy})
        if state.rank.main:
            log.figure("confusion", confusion(torch.tensor(result.matrix)))
        return result.accuracy

    def objective(images: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor) -> LossAndLogs:
        with state.autocast():
            logits = state.model(images)
            loss = cross_entropy(logits, targets)
        hits = (logits.argmax(1) == targets).sum() / valid.sum()
        return loss, {"loss": loss, "accuracy": 100 * hits}

    has_views_figure = state.step > 0 or not state.rank.main
    batches = steps(
        state,
        job.loader,
        recipe.run,
        log=log,
        evaluate=validate if job.val is not None else None,
        eval_every_epochs=recipe.eval_every_epochs,
    )
    for batch in batches:
        if not has_views_figure:
            has_views_figure = True
            grid = views_grid(batch.images, targets=batch.targets, normalize=recipe.train.normalize)
            log.figure("views", grid)
        state.train_step(objective, batch.images, batch.targets, batch.valid)
    return results.get(state.step)


def evaluate(state: TrainState, val: Loader, recipe: Pretrain) -> ConfusionResult:
    """Return the confusion of rotations over the whole validation set, for any world size."""
    state.sync_buffers()
    state.module.eval()
    try:
        return score_rotations(state.module, val, state.rank, recipe.run.precision)
    finally:
        state.module.train()


def _finish(
    recipe: Pretrain,
    state: TrainState,
    job: Job[Loader],
    result: ConfusionResult | None,
    log: RunLog,
) -> None:
    """Write weights, results and figures, then mark the run as finished."""
    model = state.module
    assert isinstance(model, RotNet)
    logger.info("digest of all sample ids and crop boxes: %s", state.digest)
    if not state.rank.main:
        return
    meta = {"recipe": recipe.name, "step": str(state.step), "data": job.loader.data_id}
    sha = save_backbone(log.out / "backbone.safetensors", model.backbone, meta)
    if result is not None:
        log.result(
            "rotation",
            metric="accuracy",
            value=100 * result.accuracy,
            unit="%",
            n=result.n,
            checkpoint_sha256=sha,
            chance=100 / ROTATIONS,
            stream_digest=state.digest,
        )
        log.figure("confusion", confusion(torch.tensor(result.matrix)))
    log.figure("filters", filters(_first_filters(model.backbone)))
    log.figure("curves", curves(read_rows(log.out / "log.jsonl")))
    job.finish(state)


def _network(recipe: Pretrain, rank: Rank) -> RotNet:
    model = convert_sync_bn(make_rotnet(recipe.backbone), recipe.sync_bn, rank, recipe.run)
    return channels_last(model, rank.device).train()


def _announce(recipe: Pretrain, job: Job[Loader]) -> None:
    images = recipe.train.batch_size * job.rank.world
    logger.info(
        "%s: %s on %s x %d, engine %s, %d images = %d views a step, %d steps",
        recipe.name,
        recipe.backbone,
        job.rank.device.type,
        job.rank.world,
        job.loader.engine,
        images,
        ROTATIONS * images,
        job.total,
    )


def _first_filters(backbone: Backbone) -> torch.Tensor:
    conv = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    return conv.weight.detach().float().cpu()
