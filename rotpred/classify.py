"""Classification with a frozen trunk: several kinds of probes, trained in one pass of it."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from pipelines.loader import Loader
from rotpred import figures, probes
from rotpred.backbone import Backbone, build_backbone
from rotpred.distributed import Rank
from rotpred.job import check_data, identity, open_data, open_log, total_steps
from rotpred.loop import steps, stream_digest
from rotpred.metrics import TopK
from rotpred.probes import ProbeSet, StageProbe
from rotpred.recipes import Linear, Probe
from rotpred.runlog import RunLog, lock, read_rows
from rotpred.state import Trained, TrainState, autocast, channels_last
from rotpred.weights import load_backbone

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, float]]
"""Metrics (top1, top5, n) by probe."""

RANDOM = "random"
"""Value of `Linear.weights` for the control: the same network, untrained."""


def run(recipe: Linear, rank: Rank) -> Path:
    """Train the probes, count exact top-1 and top-5 over the validation set, write the run folder.

    Returns:
        The run folder, with one row per probe and metric in results.json.

    Raises:
        ValueError: weights, data and recipe do not fit together, in words.
        Stopped: a signal ended the run after a checkpoint.
    """
    out = Path(recipe.run.out or f"runs/{recipe.name}")
    torch.manual_seed(recipe.train.seed)
    with contextlib.ExitStack() as stack:
        if rank.main:
            stack.enter_context(lock(out))
        if "rotate4" in (recipe.train.views, recipe.val.views):
            raise ValueError("classification reads each picture once: views must be plain")
        trunk, sha = load_trunk(recipe.backbone, recipe.weights, rank)
        loader = stack.enter_context(open_data(recipe.train, rank, recipe.run))
        val = stack.enter_context(open_data(recipe.val, rank, recipe.run))
        check_data(loader, rank)
        classes = _classes(loader, val)
        parts = [
            (ProbeSet(build_probes(probe, trunk, classes, recipe.train.crop.size)), probe)
            for probe in recipe.probes
        ]
        heads = ProbeSet(probe for part, _ in parts for probe in part).to(rank.device)
        if rank.world > 1 and rank.device.type == "cuda":
            # As mmselfsup's heads; in place, below the StageProbes that the optimisers hold.
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(heads)  # type: ignore[no-untyped-call]
        state = TrainState(
            heads,
            [Trained(part, probe.optim, probe.schedule) for part, probe in parts],
            rank=rank,
            run=recipe.run,
            folder=out / "checkpoints",
            global_batch=recipe.train.batch_size * rank.world,
            identity=identity(
                loader,
                rank,
                recipe.run,
                backbone=recipe.backbone,
                weights=sha,
                probes=[asdict(probe) for probe in recipe.probes],
            ),
        )
        state.resume()
        total = total_steps(loader, recipe.run)
        log = stack.enter_context(open_log(out, recipe, rank, total=total, start_step=state.step))
        logger.info(
            "%s: %d probes on %s (%s), engine %s, %d classes, %d steps",
            recipe.name, len(heads), recipe.backbone, recipe.weights, loader.engine, classes, total,
        )  # fmt: skip
        scores = _train(recipe, state, trunk, loader, val, log)
        _finish(recipe, state, loader, scores or evaluate(recipe, state, trunk, val), log, sha)
    return out


def load_trunk(name: str, weights: str, rank: Rank) -> tuple[Backbone, str]:
    """A frozen backbone in evaluation mode, and the checksum of its weights ("" for random ones).

    Raises:
        ValueError: no weights were named, or they do not fit (`CheckpointError`), in words.
    """
    if not weights:
        raise ValueError(
            "name the weights to evaluate: --weights FILE (backbone.safetensors of a run), or "
            "--weights random for the untrained control"
        )
    trunk = build_backbone(name)
    sha = ""
    if weights != RANDOM:
        report = load_backbone(trunk, Path(weights))
        sha = report.sha256
        logger.info(
            "%s: %d tensors loaded, %d ignored (%s), %d missing",
            weights, len(report.loaded), len(report.ignored),
            ", ".join(report.ignored[:3]) or "none", len(report.missing),
        )  # fmt: skip
    trunk = channels_last(trunk, rank.device)
    # eval() for good: batch norm must use the trained statistics and must not move them.
    return trunk.eval().requires_grad_(False), sha


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
    recipe: Linear, state: TrainState, trunk: Backbone, loader: Loader, val: Loader, log: RunLog
) -> Scores | None:
    """Train to the end; returns the validation of the final probes, where an epoch ended there."""
    results: dict[int, Scores] = {}

    stages = torch.compile(trunk.stages) if recipe.run.compile else trunk.stages

    def validate(_finished: int) -> float:
        scores = results[state.step] = evaluate(recipe, state, trunk, val)
        tops = {f"top1/{name}": 100 * score["top1"] for name, score in scores.items()}
        log.validation(step=state.step, values=tops)
        return max(score["top1"] for score in scores.values())

    for batch in steps(
        state, loader, recipe.run, log=log, evaluate=validate, eval_every=recipe.eval_every
    ):
        with state.autocast(), torch.no_grad():
            maps = stages(batch.images)
        # The probes work in fp32: bf16 logits of a thousand classes tie too often to be ranked.
        logits = state.model(maps)
        losses = torch.stack([cross_entropy(probe, batch.targets) for probe in logits])
        # Each probe has its own parameters: the gradient of the sum is each one's own gradient.
        state.update(losses.sum())
        state.record(loss=losses.mean())
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
    recipe: Linear, state: TrainState, loader: Loader, scores: Scores, log: RunLog, sha: str
) -> None:
    logger.info("digest of all sample ids and crop boxes: %s", stream_digest(loader, state.rank))
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
