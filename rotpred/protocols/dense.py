"""What detection and segmentation have in common: scaling, training, validation, results."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

import torch
from matplotlib.figure import Figure
from torch import nn

from pipelines.dense.batch import DenseBatch
from pipelines.dense.loader import DenseLoader, open_dense
from pipelines.dense.spec import DenseSpec
from pipelines.spec import Shard
from rotpred.distributed import Rank
from rotpred.files import write_json
from rotpred.models.base import Backbone
from rotpred.models.memory_format import channels_last
from rotpred.plots.training import curves
from rotpred.protocols.session import Job, open_run
from rotpred.records.folder import DONE
from rotpred.records.log import RunLog, lock, read_rows
from rotpred.training.loop import steps
from rotpred.training.optim import Optim
from rotpred.training.schedule import Schedule
from rotpred.training.settings import RunSettings
from rotpred.training.state import LossAndLogs, OptimizedPart, TrainState
from rotpred.training.sync_bn import SyncBn, check, synced
from rotpred.weights.frozen_backbone import HasWeights, load_frozen_backbone

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DenseResult:
    """What a validation found, the same on all ranks."""

    values: Mapping[str, float]
    """Metrics by name, shares from 0 to 1; the first one decides which checkpoint is the best."""
    n: int
    """Images."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Images by name, on the main rank."""


class DenseRecipe(HasWeights, Protocol):
    """What recipes of dense tasks have."""

    @property
    def train(self) -> DenseSpec:
        """Training data."""

    @property
    def val(self) -> DenseSpec:
        """Validation data."""

    @property
    def optim(self) -> Optim:
        """Optimiser of the whole network."""

    @property
    def schedule(self) -> Schedule:
        """Learning rate over time, in epochs."""

    @property
    def sync_bn(self) -> SyncBn:
        """Batch norm over all processes, or over each process's own images."""

    @property
    def predictions(self) -> str:
        """File or folder to score instead of training."""

    @property
    def eval_every_epochs(self) -> int:
        """Epochs between validations."""

    @property
    def run(self) -> RunSettings:
        """How it is driven."""


class Task(Protocol):
    """What dense tasks do differently."""

    def network(self, backbone: Backbone, classes: int) -> nn.Module:
        """The network around a backbone in training mode, on the CPU."""

    def objective(self, state: TrainState, batch: DenseBatch) -> LossAndLogs:
        """Loss and scalars of a batch; calls state.model, under state.autocast()."""

    def evaluate(self, state: TrainState, val: DenseLoader) -> DenseResult:
        """Exact metrics over the validation data; all ranks call, in evaluation mode, without
        gradients."""

    def identity(self) -> dict[str, object]:
        """What decides the weights beside data, optimiser and schedule, as plain JSON."""


R = TypeVar("R", bound=DenseRecipe)


def run(recipe: R, rank: Rank, make: Callable[[R], Task]) -> Path:
    """Train, validate, and write the run folder; on a folder with checkpoints, go on.

    Raises:
        ValueError: weights, data and recipe do not fit together, in words.
        Stopped: a signal ended the run after a checkpoint.
    """
    recipe = scaled(recipe, rank)
    if recipe.run.cuda_graph:
        raise ValueError(f"{recipe.name}: no CUDA graph holds its steps: pass --run.no-cuda-graph")
    check(recipe.sync_bn, rank, recipe.run)
    task = make(recipe)
    with open_run(recipe, rank, _open) as job:
        assert job.val is not None
        if job.loader.classes != job.val.classes:
            raise ValueError("training and validation data have different classes")
        backbone, sha = load_frozen_backbone(recipe.backbone, recipe.weights, rank)
        module = task.network(backbone.cpu().requires_grad_(True).train(), len(job.loader.classes))
        module = channels_last(synced(module, recipe.sync_bn, rank, recipe.run), rank.device)
        state = job.train_state(
            module.train(),
            [OptimizedPart(module, recipe.optim, recipe.schedule)],
            backbone=recipe.backbone,
            weights=sha,
            sync_bn=recipe.sync_bn,
            optim=asdict(recipe.optim),
            schedule={"kind": type(recipe.schedule).__name__, **asdict(recipe.schedule)},
            **task.identity(),
        )
        with job.begin(state) as log:
            if log is not None:
                logger.info(
                    "%s: %s (%s) on %s x %d, %d images, %d steps of %d",
                    recipe.name, recipe.backbone, recipe.weights, rank.device.type, rank.world,
                    len(job.loader.samples), job.total, recipe.train.batch_size * rank.world,
                )  # fmt: skip
                _finish(recipe, state, job, _train(recipe, task, state, job, log), log, sha)
    return job.out


def score(recipe: R, rank: Rank, count: Callable[[DenseLoader], DenseResult]) -> Path:
    """Compare predictions in files with the validation data, and write the run folder.

    The page counts them among the results of trained weights, or of those that recipe.weights names
    beside the predictions ("random", "imagenet").

    Args:
        recipe: its validation data, and where the files are.
        rank: all ranks call.
        count: reads the files and compares; returns the same on all ranks.
    """
    path = Path(recipe.predictions)
    out = Path(recipe.run.out or f"runs/{recipe.name}_predictions")
    with (
        lock(out, recipe.name) if rank.main else contextlib.nullcontext(),
        _open(recipe.val, rank, recipe.run) as val,
    ):
        found = count(val)
        with RunLog(
            out, recipe=recipe, rank_main=rank.main, world=rank.world, total_steps=0,
            device=str(rank.device),
        ) as log:  # fmt: skip
            about = {"weights": Path(recipe.weights or path).name, "predictions": path.name}
            _results(recipe, found, log, **about)
            for name, figure in found.figures.items():
                log.figure(name, figure)
            if rank.main:
                write_json(out / DONE, {"val": val.data_id, **about})
    return out


@contextlib.contextmanager
def any_shape() -> Iterator[None]:
    """Let cuDNN choose without trials, which it would make anew for nearly every image."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def scaled(recipe: R, rank: Rank) -> R:
    """The recipe for this many processes: the same epochs of images, the rate by linear scaling.

    An epoch of `train.steps_per_epoch` steps belongs to `optim.reference_batch` images a step;
    with a k-th of them it has k times as many steps, and `Optim.lr_for` takes a k-th of the rate
    (Goyal et al. 2017, section 2.1); where `run.accumulate` adds up the gradients of several steps,
    the rate is that of all their images. Milestones and warm-up count epochs, so they follow.
    """
    reference, batch = recipe.optim.reference_batch, recipe.train.batch_size * rank.world
    length = recipe.train.steps_per_epoch
    if reference is None or length is None or batch == reference:
        return recipe
    steps_now = max(1, round(length * reference / batch))
    update = batch * recipe.run.accumulate
    logger.info(
        "%d images a step, not %d: rate %g x %d/%d = %g, and %d steps an epoch x %d/%d = %d",
        batch, reference, recipe.optim.lr, update, reference, recipe.optim.lr_for(update),
        length, reference, batch, steps_now,
    )  # fmt: skip
    return replace(recipe, train=replace(recipe.train, steps_per_epoch=steps_now))  # type: ignore[type-var]


def _open(spec: DenseSpec, rank: Rank, run: RunSettings) -> DenseLoader:
    shard = Shard(rank.rank, rank.world, rank.local_world)
    return open_dense(spec, shard=shard, device=rank.device, precision=run.precision)


def _train(
    recipe: DenseRecipe, task: Task, state: TrainState, job: Job[DenseLoader], log: RunLog
) -> DenseResult:
    """Train to the end; returns the validation of the final weights."""
    last: tuple[int, DenseResult] | None = None  # not all: their figures are large images

    def validate(_finished: int) -> float:
        nonlocal last
        assert job.val is not None
        found = evaluate(task, state, job.val)
        last = state.step, found
        log.validation(step=state.step, values={k: 100 * v for k, v in found.values.items()})
        for name, figure in found.figures.items():
            log.figure(name, figure)
        return next(iter(found.values.values()))

    def objective(batch: DenseBatch) -> LossAndLogs:
        return task.objective(state, batch)

    data, pace = job.loader, recipe.eval_every_epochs
    for batch in steps(state, data, recipe.run, log=log, evaluate=validate, eval_every_epochs=pace):
        state.train_step(objective, batch)
    if last is None or last[0] != state.step:  # max_steps ended it inside an epoch
        validate(0)
    assert last is not None
    return last[1]


def evaluate(task: Task, state: TrainState, val: DenseLoader) -> DenseResult:
    """Validate the weights as they are, on all ranks."""
    state.sync_buffers()
    state.module.eval()
    try:
        with torch.no_grad():
            return task.evaluate(state, val)
    finally:
        state.module.train()


def _finish(
    recipe: DenseRecipe,
    state: TrainState,
    job: Job[DenseLoader],
    found: DenseResult,
    log: RunLog,
    sha: str,
) -> None:
    logger.info("digest of all sample ids and crops: %s", state.digest)
    if not state.rank.main:
        return
    about: dict[str, Any] = {"checkpoint_sha256": sha or None, "weights": Path(recipe.weights).name}
    _results(recipe, found, log, **about)
    rows = read_rows(log.out / "log.jsonl")
    for metric, name, unit in (
        ("training speed", "images_per_s", "images/s"),
        ("waiting for data", "data_wait_percent", "% of the time"),
        ("memory of the process", "rss_mib", "MiB"),
        ("memory of the GPU, peak", "cuda_peak_mib", "MiB"),
    ):
        if values := [v for row in rows if isinstance(v := row.get(name), int | float)]:
            middle = float(max(values) if unit == "MiB" else median(values))
            log.result(recipe.name, metric=metric, value=middle, unit=unit, n=len(values), **about)
    log.figure("curves", curves(rows))
    job.finish(state)


def _results(recipe: DenseRecipe, found: DenseResult, log: RunLog, **about: Any) -> None:
    for metric, value in found.values.items():
        log.result(recipe.name, metric=metric, value=100 * value, unit="%", n=found.n, **about)
