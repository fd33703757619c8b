"""Classification with a frozen backbone: several kinds of probes, trained in one pass of it."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from pipelines.loader import Loader
from rotpred.distributed import Rank
from rotpred.features.base import AVGPOOL
from rotpred.features.extract import extract, open_images
from rotpred.features.loader import FeatureLoader
from rotpred.models import probes
from rotpred.models.base import Backbone
from rotpred.models.heads import pooled_dims, stage_pools
from rotpred.models.probes import ProbeSet, StageProbe
from rotpred.plots.training import curves
from rotpred.protocols.classes import number_of_classes
from rotpred.protocols.scoring import Scores, score
from rotpred.protocols.session import Job, open_job
from rotpred.recipes.linear import Linear, Probe
from rotpred.records.log import RunLog, lock, read_rows
from rotpred.training.data import check_data
from rotpred.training.loop import steps
from rotpred.training.precision import autocast
from rotpred.training.state import LossAndLogs, OptimizedPart, TrainState
from rotpred.weights.frozen_backbone import load_frozen_backbone

logger = logging.getLogger(__name__)

CACHED = "features of the validation crop, no augmentation"
"""What results say of probes that were trained on cached features."""

# What chooses samples; all else of the training data's spec is replaced by that of the validation.
_OF_DATA = (
    "data",
    "root",
    "engine",
    "max_samples",
    "samples_per_class",
    "seed",
    "max_undecodable",
    "samples",
    "workers",
)

Reader = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""The images of a batch to what probes read: the maps of all stages, or features."""


@dataclass(frozen=True)
class _Setup:
    """An open job with its backbone."""

    job: Job[Loader]
    backbone: Backbone
    sha: str
    """Checksum of the weights, "" for random ones."""
    names: tuple[str, ...] = ()
    """Stages of which there are features; empty where the backbone reads images."""


@dataclass(frozen=True)
class _Part:
    """Probes with one optimiser."""

    probes: ProbeSet
    recipe: Probe
    lr: float

    @property
    def trained(self) -> OptimizedPart:
        return OptimizedPart(
            self.probes, replace(self.recipe.optim, lr=self.lr), self.recipe.schedule
        )


def run(recipe: Linear, rank: Rank) -> Path:
    """Train the probes, count exact top-1 and top-5 over the validation set, write the run folder.

    Returns:
        The run folder, with one row per probe and metric in results.json.

    Raises:
        ValueError: weights, data and recipe do not fit together, in words.
        Stopped: a signal ended the run after a checkpoint.
    """
    with _open(recipe, rank) as setup:
        job, sha = setup.job, setup.sha
        assert job.val is not None
        classes = number_of_classes(job.loader, job.val)
        parts = _parts(recipe, setup, classes)
        heads = ProbeSet(probe for part in parts for probe in part.probes).to(rank.device)
        if len(set(heads.names)) < len(heads):
            raise ValueError(f"two probes have the same name: {', '.join(heads.names)}")
        if rank.world > 1 and rank.device.type == "cuda":
            if recipe.run.cuda_graph:
                raise ValueError("run.cuda_graph trains probes on one GPU only: they use SyncBN")
            # As mmselfsup's heads; in place, below the StageProbes that the optimisers hold.
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(heads)  # type: ignore[no-untyped-call]
        state = job.train_state(
            heads,
            [part.trained for part in parts],
            backbone=recipe.backbone,
            weights=sha,
            probes=[asdict(probe) for probe in recipe.probes],
            **({"features": setup.names} if setup.names else {}),
            **({"store": recipe.cache_store} if recipe.cache_store != "float32" else {}),
        )
        with job.begin(state) as log:
            if log is not None:
                logger.info(
                    "%s: %d probes on %s (%s), engine %s, %d classes, %d steps",
                    recipe.name, len(heads), recipe.backbone, recipe.weights, job.loader.engine,
                    classes, job.total,
                )  # fmt: skip
                scores = _train(recipe, state, setup, log)
                if scores is None:  # max_steps ended it inside an epoch
                    scores = evaluate(state, _reader(recipe, setup, rank), job.val)
                _finish(recipe, state, setup, parts, scores, log)
    return job.out


def build_probes(probe: Probe, backbone: Backbone, classes: int, size: int) -> list[StageProbe]:
    """The classifiers that a recipe's entry stands for."""
    match probe.kind:
        case "avgpool":
            return probes.avgpool(backbone, classes)
        case "stages":
            return probes.stages(backbone, classes, size, affine=probe.affine)
        case "conv":
            return probes.conv(backbone, classes)
        case "nonlinear":
            return probes.nonlinear(backbone, classes, size)


@contextlib.contextmanager
def _open(recipe: Linear, rank: Rank) -> Iterator[_Setup]:
    """The job with its backbone; with `recipe.cache`, on features that are extracted first."""
    if not recipe.cache:
        if recipe.cache_store != "float32":
            raise ValueError(f"cache_store {recipe.cache_store} is for a cache: name its folder")
        with open_job(recipe, rank, views="plain") as job:
            yield _Setup(job, *load_frozen_backbone(recipe.backbone, recipe.weights, rank))
        return
    kinds = {probe.kind for probe in recipe.probes}
    if not kinds <= {"avgpool", "stages"}:
        raise ValueError("cache is for probes of kind avgpool and stages, which read pooled maps")
    out = Path(recipe.run.out or f"runs/{recipe.name}")
    torch.manual_seed(recipe.train.seed)  # as open_job: of random weights and the probes'
    with lock(out, recipe.name) if rank.main else contextlib.nullcontext():
        backbone, sha = load_frozen_backbone(recipe.backbone, recipe.weights, rank)
        names = backbone.stage_names if "stages" in kinds else ()
        names = (*names, AVGPOOL) if "avgpool" in kinds else names
        own = {n: getattr(recipe.train, n) for n in _OF_DATA}
        specs = (replace(recipe.val, **own), recipe.val)
        precision = recipe.run.precision
        with contextlib.ExitStack() as stack:
            # Both are opened before the work on either, which may take hours.
            data = [stack.enter_context(open_images(spec, rank, precision)) for spec in specs]
            number_of_classes(*data)
            found = [
                extract(
                    *(backbone, part, rank),
                    names=names,
                    precision=precision,
                    cache=Path(recipe.cache),
                    store=recipe.cache_store,
                )
                for part in data
            ]
        size = recipe.train.batch_size
        train = replace(specs[0], batch_size=size, shuffle=True, drop_last=True)
        loaders = [
            FeatureLoader(features, spec, names=names, rank=rank)
            for features, spec in zip(found, (train, recipe.val), strict=True)
        ]
        check_data(loaders[0], rank)
        yield _Setup(Job(recipe, rank, out, *loaders), backbone, sha, names)


def _parts(recipe: Linear, setup: _Setup, classes: int) -> list[_Part]:
    """All probes, a part for each optimiser."""
    size = recipe.val.crop.size if setup.names else recipe.train.crop.size
    shapes = _pooled_shapes(setup, size)
    parts = []
    for probe in recipe.probes:
        for lr in probe.lrs or (probe.optim.lr,):
            made = build_probes(probe, setup.backbone, classes, size)
            if setup.names:
                places = [setup.names.index(one.name) for one in made]
                made = [
                    probes.on_features(one, place, shapes[place])
                    for one, place in zip(made, places, strict=True)
                ]
            if probe.lrs:
                for one in made:
                    one.name = f"{one.name}@{lr:g}"
            parts.append(_Part(ProbeSet(made), probe, lr))
    return parts


def _pooled_shapes(setup: _Setup, size: int) -> list[tuple[int, int, int]]:
    """(channels, height, width) of the features that there are."""
    backbone = setup.backbone
    known = {AVGPOOL: (backbone.dim, 1, 1)}
    dims = pooled_dims(backbone, size, stage_pools(backbone, size))
    for name, channels, dim in zip(
        backbone.stage_names, backbone.stage_channels, dims, strict=True
    ):
        side = math.isqrt(dim // channels)
        known[name] = (channels, side, side)
    return [known[name] for name in setup.names]


def _reader(recipe: Linear, setup: _Setup, rank: Rank, *, compiled: bool = False) -> Reader:
    if setup.names:
        dims = [math.prod(shape) for shape in _pooled_shapes(setup, recipe.val.crop.size)]
        return lambda images: torch.split(images, dims, dim=1)
    stages = setup.backbone.stages
    if compiled:
        stages = torch.compile(stages, dynamic=False)

    def read(images: torch.Tensor) -> Sequence[torch.Tensor]:
        with autocast(rank.device, recipe.run.precision), torch.no_grad():
            return stages(images)

    return read


def _train(recipe: Linear, state: TrainState, setup: _Setup, log: RunLog) -> Scores | None:
    """Train to the end; returns the validation of the final probes, where an epoch ended there."""
    results: dict[int, Scores] = {}
    read = _reader(recipe, setup, state.rank, compiled=recipe.run.compile)
    read_val = _reader(recipe, setup, state.rank)

    def objective(images: torch.Tensor, targets: torch.Tensor) -> LossAndLogs:
        maps = read(images)
        # The probes work in fp32: bf16 logits of a thousand classes tie too often to be ranked.
        losses = torch.stack([cross_entropy(logits, targets) for logits in state.model(maps)])
        # Each probe has its own parameters: the gradient of the sum is each one's own gradient.
        return losses.sum(), {"loss": losses.mean()}

    def validate(_finished: int) -> float:
        assert setup.job.val is not None
        scores = results[state.step] = evaluate(state, read_val, setup.job.val)
        tops = {f"top1/{name}": 100 * score["top1"] for name, score in scores.items()}
        log.validation(step=state.step, values=tops)
        return max(score["top1"] for score in scores.values())

    data, pace = setup.job.loader, recipe.eval_every_epochs
    for batch in steps(state, data, recipe.run, log=log, evaluate=validate, eval_every_epochs=pace):
        state.train_step(objective, batch.images, batch.targets)
    return results.get(state.step)


def evaluate(state: TrainState, read: Reader, val: Loader) -> Scores:
    """Top-1, and top-5 where there are more than five classes, of every probe by name."""
    state.sync_buffers()
    heads = state.module
    assert isinstance(heads, ProbeSet)
    heads.eval()
    try:
        return score(val, state.rank, heads.names, lambda images: heads(read(images)))
    finally:
        heads.train()


def _finish(
    recipe: Linear,
    state: TrainState,
    setup: _Setup,
    parts: list[_Part],
    scores: Scores,
    log: RunLog,
) -> None:
    logger.info("digest of all sample ids and crop boxes: %s", state.digest)

    own: dict[str, Any] = {}
    if setup.names:
        half = recipe.cache_store != "float32"
        own["protocol"] = f"{CACHED}, stored as {recipe.cache_store}" if half else CACHED

    def results(name: str, score: dict[str, float], **extra: Any) -> None:
        for metric in ("top1", "top5"):
            if metric in score:
                log.result(
                    recipe.name,
                    metric=f"{metric}/{name}",
                    value=100 * score[metric],
                    unit="%",
                    n=int(score["n"]),
                    checkpoint_sha256=setup.sha or None,
                    weights=Path(recipe.weights).name,
                    **own,
                    **extra,
                )

    rivals: dict[str, list[tuple[float, str]]] = {}
    for part in parts:
        for name in part.probes.names:
            if part.recipe.lrs:
                rivals.setdefault(name.rpartition("@")[0], []).append((part.lr, name))
            else:
                results(name, scores[name])
    for base, candidates in rivals.items():
        best_lr, best = max(candidates, key=lambda one: scores[one[1]]["top1"])
        for lr, name in candidates:
            results(name, scores[name], lr=lr, best=name == best)
        results(base, scores[best], lr=best_lr, chosen_from=len(candidates), chosen_on="val")
    if state.rank.main:
        log.figure("curves", curves(read_rows(log.out / "log.jsonl")))
    setup.job.finish(state)
