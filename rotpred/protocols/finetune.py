"""Semi-supervised evaluation: fine-tuning of all layers on a fraction of the labels."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from pipelines.loader import Loader
from rotpred.distributed import Rank
from rotpred.models.heads import RotNet, make_rotnet
from rotpred.plots.grid import grid_figure
from rotpred.plots.training import curves
from rotpred.protocols.classes import number_of_classes
from rotpred.protocols.scoring import Scores, log_scores, score
from rotpred.protocols.session import Job, open_job
from rotpred.recipes.finetune import FineTuning
from rotpred.records.folder import read_results
from rotpred.records.log import RunLog, lock, read_rows
from rotpred.training.loop import NotFiniteError, steps
from rotpred.training.precision import autocast
from rotpred.training.state import LossAndLogs, OptimizedPart, TrainState
from rotpred.training.sync_bn import convert_sync_bn
from rotpred.weights.frozen_backbone import load_frozen_backbone

logger = logging.getLogger(__name__)

Pair = tuple[float, float]
"""Learning rate, and multiple of it for the head."""


class Classifier(RotNet):
    """Backbone and head. The head computes in fp32, also under autocast.

    In bf16, logits of a thousand classes tie too often to be ranked.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, 3, S, S) to float32 logits (N, classes)."""
        features = self.backbone(x)
        with torch.autocast(features.device.type, enabled=False):
            logits: torch.Tensor = self.head(features.float())
        return logits


def run(recipe: FineTuning, rank: Rank) -> Path:
    """Fine-tune, compute exact top-1 and top-5, write the run folder. `recipe.grid`: for all pairs.

    Returns:
        The run folder.

    Raises:
        ValueError: The weights, data and recipe do not fit together.
        Stopped: A signal ended the run after a checkpoint.
    """
    with deterministic() if recipe.deterministic else contextlib.nullcontext():
        if recipe.grid:
            return _grid(recipe, rank)
        return _point(recipe, rank)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Restrict torch to deterministic kernels. An operation without one raises RuntimeError."""
    cudnn = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark)
    strict = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    # cuBLAS reads it at the first use of a device. Without it torch refuses matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn.deterministic, cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])
        cudnn.deterministic, cudnn.benchmark = before


def _point(recipe: FineTuning, rank: Rank) -> Path:
    """Train one pair of learning rate and head multiple."""
    with open_job(recipe, rank, views="plain") as job:
        assert job.val is not None
        model, sha = _network(recipe, number_of_classes(job.loader, job.val), rank)
        head = replace(recipe.optim, lr=recipe.optim.lr * recipe.head_lr_mult)
        state = job.train_state(
            model,
            [
                OptimizedPart(model.backbone, recipe.optim, recipe.schedule),
                OptimizedPart(model.head, head, recipe.schedule),
            ],
            backbone=recipe.backbone,
            weights=sha,
            sync_bn=recipe.sync_bn,
            deterministic=recipe.deterministic,
            optim=asdict(recipe.optim),
            head_lr_mult=recipe.head_lr_mult,
            schedule={"kind": type(recipe.schedule).__name__, **asdict(recipe.schedule)},
        )
        with job.begin(state) as log:
            if log is not None:
                logger.info(
                    "%s: %s (%s), learning rate %g, head x%g, engine %s, %d steps",
                    recipe.name, recipe.backbone, recipe.weights, recipe.optim.lr,
                    recipe.head_lr_mult, job.loader.engine, job.total,
                )  # fmt: skip
                scores = _train(recipe, state, job, log)
                if scores is None:  # max_steps ended it mid-epoch
                    scores = evaluate(recipe, state, job.val)
                _finish(recipe, state, job, scores, log, sha)
    return job.out


def _network(recipe: FineTuning, classes: int, rank: Rank) -> tuple[Classifier, str]:
    backbone, sha = load_frozen_backbone(recipe.backbone, recipe.weights, rank)
    head = make_rotnet(recipe.backbone, classes).head.to(rank.device)
    model = Classifier(backbone.requires_grad_(True), head)
    return convert_sync_bn(model, recipe.sync_bn, rank, recipe.run).train(), sha


def _train(recipe: FineTuning, state: TrainState, job: Job[Loader], log: RunLog) -> Scores | None:
    """Train to the end. Return the last validation, if it is of the final weights."""
    results: dict[int, Scores] = {}

    def objective(images: torch.Tensor, targets: torch.Tensor) -> LossAndLogs:
        with state.autocast():
            logits = state.model(images)
        loss = cross_entropy(logits, targets)
        hits = (logits.argmax(1) == targets).float().mean()
        return loss, {"loss": loss, "accuracy": 100 * hits}

    def validate(_finished: int) -> float:
        assert job.val is not None
        scores = results[state.step] = evaluate(recipe, state, job.val)
        log.validation(step=state.step, values={"accuracy": 100 * scores[""]["top1"]})
        return scores[""]["top1"]

    data, pace = job.loader, recipe.eval_every_epochs
    for batch in steps(state, data, recipe.run, log=log, evaluate=validate, eval_every_epochs=pace):
        state.train_step(objective, batch.images, batch.targets)
    return results.get(state.step)


def evaluate(recipe: FineTuning, state: TrainState, val: Loader) -> Scores:
    """Return top-1, and top-5 if there are more than five classes, of the only classifier, ""."""
    state.sync_buffers()
    model, rank = state.module, state.rank

    def logits_of(images: torch.Tensor) -> list[torch.Tensor]:
        with autocast(rank.device, recipe.run.precision):
            return [model(images)]

    model.eval()
    try:
        return score(val, rank, [""], logits_of)
    finally:
        model.train()


def _finish(
    recipe: FineTuning, state: TrainState, job: Job[Loader], scores: Scores, log: RunLog, sha: str
) -> None:
    logger.info("digest of all sample ids and crop boxes: %s", state.digest)
    log_scores(
        log,
        recipe.name,
        scores[""],
        checkpoint_sha256=sha or None,
        weights=Path(recipe.weights).name,
        fraction=recipe.fraction,
        lr=recipe.optim.lr,
        head_lr_mult=recipe.head_lr_mult,
    )
    if state.rank.main:
        log.figure("curves", curves(read_rows(log.out / "log.jsonl")))
    job.finish(state)


def _grid(recipe: FineTuning, rank: Rank) -> Path:
    """Train all pairs in turn. Finished ones are read from their folders."""
    out = Path(recipe.run.out or f"runs/{recipe.name}")
    points: dict[Pair, dict[str, dict[str, Any]]] = {}
    with lock(out, recipe.name) if rank.main else contextlib.nullcontext():
        for lr, mult in itertools.product(recipe.lrs, recipe.head_lr_mults):
            folder = out / "grid" / f"lr{lr:g}_head{mult:g}"
            point = replace(
                recipe,
                grid=False,
                head_lr_mult=mult,
                optim=replace(recipe.optim, lr=lr),
                run=replace(recipe.run, out=str(folder)),
            )
            points[lr, mult] = {}
            try:
                _point(point, rank)
            except NotFiniteError as error:  # raised on all ranks; counts as a result
                logger.warning("learning rate %g, head x%g: %s", lr, mult, error)
                continue
            if rank.main:
                rows = read_results(folder / "results.json")
                points[lr, mult] = {str(row["metric"]): row for row in rows}
        with RunLog(
            out,
            recipe=recipe,
            rank_main=rank.main,
            world=rank.world,
            total_steps=len(points),
            device=str(rank.device),
        ) as log:
            if rank.main:
                _report(recipe, points, log)
    return out


def _report(recipe: FineTuning, points: dict[Pair, dict[str, dict[str, Any]]], log: RunLog) -> None:
    """Write all results, the best again, and the figure of the grid."""
    trained = {pair: rows for pair, rows in points.items() if rows}
    if not trained:
        raise ValueError(f"no learning rate of the grid gave a finite loss: {sorted(points)}")
    best = max(trained, key=lambda pair: trained[pair]["top1"]["value"])
    for pair, rows in trained.items():
        for metric, row in rows.items():
            log.result(**row | {"metric": f"{metric}/{_name(pair)}"}, best=pair == best)
    for row in trained[best].values():
        log.result(
            **row,
            chosen_on="val",
            chosen_from=len(points),
            not_finite=[_name(pair) for pair in points if pair not in trained],
        )
    tops = np.array(
        [
            [points[lr, mult].get("top1", {}).get("value", np.nan) for mult in recipe.head_lr_mults]
            for lr in recipe.lrs
        ]
    )
    log.figure("grid", grid_figure(tops, lrs=recipe.lrs, head_lr_mults=recipe.head_lr_mults))


def _name(pair: Pair) -> str:
    return f"lr={pair[0]:g},head={pair[1]:g}"
