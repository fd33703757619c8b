"""Semi-supervised evaluation: fine-tuning of all layers on a fraction of the labels."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from pipelines.batch import Batch
from pipelines.loader import Loader
from rotpred.distributed import Rank
from rotpred.models.heads import RotNet, make_rotnet
from rotpred.plots.grid import grid_figure
from rotpred.protocols.classes import number_of_classes
from rotpred.protocols.run import Run, open_folder, open_run
from rotpred.protocols.scoring import Validation, score
from rotpred.recipes.finetune import FineTuning
from rotpred.records.folder import read_results
from rotpred.records.log import RunLog
from rotpred.training.data import check_views, open_data
from rotpred.training.loop import NotFiniteError
from rotpred.training.state import LossAndLogs, OptimizedPart, TrainState
from rotpred.training.sync_bn import convert_sync_bn

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
    check_views("plain", recipe.train, recipe.val)
    with open_run(recipe, rank, open_data) as run:
        model = _network(recipe, number_of_classes(run.train, run.val), run)
        head = replace(recipe.optim, lr=recipe.optim.lr * recipe.head_lr_mult)
        state = run.train_state(
            model,
            [
                OptimizedPart(model.backbone, recipe.optim, recipe.schedule),
                OptimizedPart(model.head, head, recipe.schedule),
            ],
            sync_bn=recipe.sync_bn,
            deterministic=recipe.deterministic,
            head_lr_mult=recipe.head_lr_mult,
            optim=recipe.optim,
            schedule=recipe.schedule,
        )
        if run.resume(state):
            logger.info(
                "%s: %s (%s), learning rate %g, head x%g, engine %s, %d steps",
                recipe.name, recipe.backbone, recipe.weights, recipe.optim.lr,
                recipe.head_lr_mult, run.train.engine, run.total,
            )  # fmt: skip

            def objective(batch: Batch) -> LossAndLogs:
                with state.autocast():
                    logits = state.model(batch.images)
                loss = cross_entropy(logits, batch.targets)
                hits = (logits.argmax(1) == batch.targets).float().mean()
                return loss, {"loss": loss, "accuracy": 100 * hits}

            found = run.fit(
                state,
                objective,
                lambda: evaluate(state, run.val),
            )
            assert found is not None
            settings = {
                "fraction": recipe.fraction,
                "lr": recipe.optim.lr,
                "head_lr_mult": recipe.head_lr_mult,
            }
            run.results(found, **settings)
    return run.out


def _network(recipe: FineTuning, classes: int, run: Run[Loader]) -> Classifier:
    head = make_rotnet(recipe.backbone, classes).head.to(run.rank.device)
    model = Classifier(run.backbone.requires_grad_(True), head)
    return convert_sync_bn(model, recipe.sync_bn, run.rank, recipe.run).train()


def evaluate(state: TrainState, val: Loader) -> Validation:
    """Return top-1, and top-5 if there are more than five classes."""

    def logits_of(images: torch.Tensor) -> list[torch.Tensor]:
        with state.autocast():
            return [state.module(images)]

    found = score(val, state.rank, [""], logits_of)
    results = {metric.removesuffix("/"): value for metric, value in found.results.items()}
    return replace(found, results=results, logged={"accuracy": results["top1"]})


def _grid(recipe: FineTuning, rank: Rank) -> Path:
    """Train all pairs in turn. Finished ones are read from their folders."""
    points: dict[Pair, dict[str, dict[str, Any]]] = {}
    with open_folder(recipe, rank) as run:
        for lr, mult in itertools.product(recipe.lrs, recipe.head_lr_mults):
            folder = run.out / "grid" / f"lr{lr:g}_head{mult:g}"
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
        run.start(len(points), repeat=True)
        if rank.main:
            _report(recipe, points, run.log)
    return run.out


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
