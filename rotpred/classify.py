"""Classification with a frozen trunk: several kinds of probes, trained in one pass of it."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from pipelines.loader import Loader
from rotpred import figures, probes
from rotpred.backbone import Backbone
from rotpred.distributed import Rank
from rotpred.features import load_trunk
from rotpred.job import Job, identity, open_job
from rotpred.loop import steps
from rotpred.metrics import TopK
from rotpred.probes import ProbeSet, StageProbe
from rotpred.recipes import Linear, Probe
from rotpred.runlog import RunLog, read_rows
from rotpred.state import Outcome, Trained, TrainState, autocast

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, float]]
"""Metrics (top1, top5, n) by probe."""


def run(recipe: Linear, rank: Rank) -> Path:
    """Train the probes, count exact top-1 and top-5 over the validation set, write the run folder.

    Returns:
        The run folder, with one row per probe and metric in results.json.

    Raises:
        ValueError: weights, data and recipe do not fit together, in words.
        Stopped: a signal ended the run after a checkpoint.
    """
    with open_job(recipe, rank, views="plain") as job:
        trunk, sha = load_trunk(recipe.backbone, recipe.weights, rank)
        assert job.val is not None
        classes = _classes(job.loader, job.val)
        parts = [
            (ProbeSet(build_probes(probe, trunk, classes, recipe.train.crop.size)), probe)
            for probe in recipe.probes
        ]
        heads = ProbeSet(probe for part, _ in parts for probe in part).to(rank.device)
        if rank.world > 1 and rank.device.type == "cuda":
            if recipe.run.cuda_graph:
                raise ValueError("run.cuda_graph trains probes on one GPU only: they use SyncBN")
            # As mmselfsup's heads; in place, below the StageProbes that the optimisers hold.
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(heads)  # type: ignore[no-untyped-call]
        state = TrainState(
            heads,
            [Trained(part, probe.optim, probe.schedule) for part, probe in parts],
            rank=rank,
            run=recipe.run,
            folder=job.out / "checkpoints",
            global_batch=recipe.train.batch_size * rank.world,
            identity=identity(
                job.loader,
                rank,
                recipe.run,
                backbone=recipe.backbone,
                weights=sha,
                probes=[asdict(probe) for probe in recipe.probes],
            ),
        )
        with job.begin(state) as log:
            if log is not None:
                logger.info(
                    "%s: %d probes on %s (%s), engine %s, %d classes, %d steps",
                    recipe.name, len(heads), recipe.backbone, recipe.weights, job.loader.engine,
                    classes, job.total,
                )  # fmt: skip
                scores = _train(recipe, state, trunk, job, log)
                _finish(
                    recipe, state, job, scores or evaluate(recipe, state, trunk, job.val), log, sha
                )
    return job.out


def build_probes(probe: Probe, trunk: Backbone, classes: int, size: int) -> list[StageProbe]:
    """The classifiers that a recipe's entry stands for."""
    match probe.kind:
        case "avgpool":
            return probes.avgpool(trunk, classes)
        case "stages":
            return probes.stages(trunk, classes, size)
        case "conv":
            return probes.conv(trunk, classes)
        case "nonlinear":
            return probes.nonlinear(trunk, classes, size)


def _train(
    recipe: Linear, state: TrainState, trunk: Backbone, job: Job, log: RunLog
) -> Scores | None:
    """Train to the end; returns the validation of the final probes, where an epoch ended there."""
    results: dict[int, Scores] = {}
    stages = torch.compile(trunk.stages, dynamic=False) if recipe.run.compile else trunk.stages

    def objective(images: torch.Tensor, targets: torch.Tensor) -> Outcome:
        with state.autocast(), torch.no_grad():
            maps = stages(images)
        # The probes work in fp32: bf16 logits of a thousand classes tie too often to be ranked.
        losses = torch.stack([cross_entropy(logits, targets) for logits in state.model(maps)])
        # Each probe has its own parameters: the gradient of the sum is each one's own gradient.
        return losses.sum(), {"loss": losses.mean()}

    def validate(_finished: int) -> float:
        assert job.val is not None
        scores = results[state.step] = evaluate(recipe, state, trunk, job.val)
        tops = {f"top1/{name}": 100 * score["top1"] for name, score in scores.items()}
        log.validation(step=state.step, values=tops)
        return max(score["top1"] for score in scores.values())

    for batch in steps(
        state, job.loader, recipe.run, log=log, evaluate=validate, eval_every=recipe.eval_every
    ):
        state.learn(objective, batch.images, batch.targets)
    return results.get(state.step)


@torch.no_grad()
def evaluate(recipe: Linear, state: TrainState, trunk: Backbone, val: Loader) -> Scores:
    """Top-1, and top-5 where there are more than five classes, of every probe by name."""
    state.agree()
    heads = state.module
    assert isinstance(heads, ProbeSet)
    names = heads.names
    counts: TopK | None = None
    heads.eval()
    try:
        for batch in val.epoch(0):
            with autocast(state.rank.device, recipe.run.precision):
                maps = trunk.stages(batch.images)
            outputs = heads(maps)
            if counts is None:
                ks = (1, 5) if outputs[0].shape[1] > 5 else (1,)
                counts = TopK(ks=ks, heads=len(names), device=state.rank.device)
            counts.update(outputs, batch.targets, batch.valid)
    finally:
        heads.train()
    assert counts is not None
    return dict(zip(names, counts.compute(state.rank), strict=True))


def _finish(
    recipe: Linear, state: TrainState, job: Job, scores: Scores, log: RunLog, sha: str
) -> None:
    logger.info("digest of all sample ids and crop boxes: %s", state.digest)
    for name, score in scores.items():
        for metric in ("top1", "top5"):
            if metric in score:
                log.result(
                    recipe.name,
                    metric=f"{metric}/{name}",
                    value=100 * score[metric],
                    unit="%",
                    n=int(score["n"]),
                    checkpoint_sha256=sha or None,
                    weights=Path(recipe.weights).name,
                )
    if state.rank.main:
        log.figure("curves", figures.curves(read_rows(log.out / "log.jsonl")))
    job.finish(state)


def _classes(loader: Loader, val: Loader) -> int:
    """Number of classes, which training and validation data must share by name and order.

    Raises:
        ValueError: the data carry no labels, or not the same ones.
    """
    highest = 0
    for part in (loader, val):
        low, high = part.label_range
        if low < 0:
            raise ValueError(f"{part.spec.data} has samples without a label")
        highest = max(highest, high)
    if loader.classes and val.classes and loader.classes != val.classes:
        raise ValueError(
            f"{loader.spec.data} and {val.spec.data} have different classes "
            f"({len(loader.classes)} and {len(val.classes)})"
        )
    # A beton that stock FFCV wrote has labels, but no names for them.
    return max(highest + 1, len(loader.classes))
