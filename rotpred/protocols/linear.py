"""Linear evaluation: probes on a frozen backbone, all trained in one pass."""

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

from pipelines.batch import Batch
from pipelines.loader import Loader
from rotpred.distributed import Rank
from rotpred.features.base import AVGPOOL
from rotpred.features.extract import extract, open_extraction_loader
from rotpred.features.loader import FeatureLoader
from rotpred.models.base import Backbone
from rotpred.models.probes import ProbeSet
from rotpred.plots.training import curves
from rotpred.protocols.classes import number_of_classes
from rotpred.protocols.probe_parts import ProbePart, build_parts, pooled_shapes
from rotpred.protocols.scoring import Scores, log_scores, score
from rotpred.protocols.session import Job, open_job
from rotpred.recipes.linear import Linear
from rotpred.records.log import RunLog, lock, read_rows
from rotpred.training.data import check_data
from rotpred.training.loader_interface import TrainingLoader
from rotpred.training.loop import steps
from rotpred.training.precision import autocast
from rotpred.training.state import LossAndLogs, TrainState
from rotpred.weights.frozen_backbone import load_frozen_backbone

logger = logging.getLogger(__name__)

CACHED = "features of the validation crop, no augmentation"
"""Value of `protocol` in the results of probes that were trained on cached features."""

# Fields of the training spec that select and read samples. A cache takes the rest from the
# validation spec.
_DATA_FIELDS = (
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
"""Maps a batch to the inputs of the probes: feature maps of all stages, or cached features."""


@dataclass(frozen=True)
class _Setup:
    """An open job and its backbone."""

    job: Job[Loader] | Job[FeatureLoader]
    backbone: Backbone
    sha: str
    """SHA-256 of the weights, "" for random ones."""
    names: tuple[str, ...] = ()
    """Stages with cached features; empty if the backbone reads images."""


def run(recipe: Linear, rank: Rank) -> Path:
    """Train the probes, compute exact top-1 and top-5 on the validation set, write the run folder.

    Returns:
        The run folder; results.json has one row per probe and metric.

    Raises:
        ValueError: The weights, data and recipe do not fit together.
        Stopped: A signal ended the run after a checkpoint.
    """
    with _open(recipe, rank) as setup:
        job, sha = setup.job, setup.sha
        assert job.val is not None
        classes = number_of_classes(job.loader, job.val)
        parts = build_parts(recipe, setup.backbone, classes, cached=setup.names)
        heads = ProbeSet(probe for part in parts for probe in part.probes).to(rank.device)
        if len(set(heads.names)) < len(heads):
            raise ValueError(f"two probes have the same name: {', '.join(heads.names)}")
        if rank.world > 1 and rank.device.type == "cuda":
            if recipe.run.cuda_graph:
                raise ValueError("run.cuda_graph trains probes on one GPU only: SyncBN on several")
            # As mmselfsup's heads. In place: the optimisers hold the StageProbes.
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
                if scores is None:  # max_steps ended it mid-epoch
                    scores = evaluate(state, _reader(recipe, setup, rank), job.val)
                _finish(recipe, state, setup, parts, scores, log)
    return job.out


@contextlib.contextmanager
def _open(recipe: Linear, rank: Rank) -> Iterator[_Setup]:
    """Open the job and its backbone. With `recipe.cache`, extract features first and read those."""
    if not recipe.cache:
        if recipe.cache_store != "float32":
            raise ValueError(f"cache_store {recipe.cache_store} needs a cache: pass --cache FOLDER")
        with open_job(recipe, rank, views="plain") as job:
            yield _Setup(job, *load_frozen_backbone(recipe.backbone, recipe.weights, rank))
        return
    kinds = {probe.kind for probe in recipe.probes}
    if not kinds <= {"avgpool", "stages"}:
        raise ValueError("cache works with probes of kind avgpool and stages only")
    out = Path(recipe.run.out or f"runs/{recipe.name}")
    torch.manual_seed(recipe.train.seed)  # as open_job, for random weights and the probes'
    with lock(out, recipe.name) if rank.main else contextlib.nullcontext():
        backbone, sha = load_frozen_backbone(recipe.backbone, recipe.weights, rank)
        names = backbone.stage_names if "stages" in kinds else ()
        names = (*names, AVGPOOL) if "avgpool" in kinds else names
        own = {n: getattr(recipe.train, n) for n in _DATA_FIELDS}
        specs = (replace(recipe.val, **own), recipe.val)
        precision = recipe.run.precision
        with contextlib.ExitStack() as stack:
            # Open both first: extraction may take hours.
            data = [
                stack.enter_context(open_extraction_loader(spec, rank, precision)) for spec in specs
            ]
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


def _reader(recipe: Linear, setup: _Setup, rank: Rank, *, compiled: bool = False) -> Reader:
    if setup.names:
        shapes = pooled_shapes(setup.backbone, recipe.val.crop.size, names=setup.names)
        dims = [math.prod(shape) for shape in shapes]
        return lambda images: torch.split(images, dims, dim=1)
    stages = setup.backbone.stages
    if compiled:
        stages = torch.compile(stages, dynamic=False)

    def read(images: torch.Tensor) -> Sequence[torch.Tensor]:
        with autocast(rank.device, recipe.run.precision), torch.no_grad():
            return stages(images)

    return read


def _train(recipe: Linear, state: TrainState, setup: _Setup, log: RunLog) -> Scores | None:
    """Train to the end. Return the last validation, if it is of the final probes."""
    results: dict[int, Scores] = {}
    read = _reader(recipe, setup, state.rank, compiled=recipe.run.compile)
    read_val = _reader(recipe, setup, state.rank)

    def objective(images: torch.Tensor, targets: torch.Tensor) -> LossAndLogs:
        inputs = read(images)
        # Probes compute in fp32: bf16 logits of a thousand classes tie too often to be ranked.
        losses = torch.stack([cross_entropy(logits, targets) for logits in state.model(inputs)])
        # Probes share no parameters, so the gradient of the sum is each one's own gradient.
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


def evaluate(state: TrainState, read: Reader, val: TrainingLoader[Batch]) -> Scores:
    """Return top-1, and top-5 if there are more than five classes, of every probe by name."""
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
    parts: list[ProbePart],
    scores: Scores,
    log: RunLog,
) -> None:
    logger.info("digest of all sample ids and crop boxes: %s", state.digest)

    own: dict[str, Any] = {}
    if setup.names:
        half = recipe.cache_store != "float32"
        own["protocol"] = f"{CACHED}, stored as {recipe.cache_store}" if half else CACHED

    def results(name: str, score: dict[str, float], **extra: Any) -> None:
        log_scores(
            log,
            recipe.name,
            score,
            suffix=f"/{name}",
            checkpoint_sha256=setup.sha or None,
            weights=Path(recipe.weights).name,
            **own,
            **extra,
        )

    sweeps: dict[str, list[tuple[float, str]]] = {}
    for part in parts:
        for name in part.probes.names:
            if part.recipe.lrs:
                sweeps.setdefault(name.rpartition("@")[0], []).append((part.lr, name))
            else:
                results(name, scores[name])
    for base, candidates in sweeps.items():
        best_lr, best = max(candidates, key=lambda one: scores[one[1]]["top1"])
        for lr, name in candidates:
            results(name, scores[name], lr=lr, best=name == best)
        results(base, scores[best], lr=best_lr, chosen_from=len(candidates), chosen_on="val")
    if state.rank.main:
        log.figure("curves", curves(read_rows(log.out / "log.jsonl")))
    setup.job.finish(state)
