"""Training, validation and results that detection and segmentation share."""

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
from pipelines.storage import write_json
from rotpred.distributed import Rank
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
from rotpred.training.sync_bn import SyncBn, check_sync_bn, convert_sync_bn
from rotpred.weights.frozen_backbone import HasWeights, load_frozen_backbone

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DenseResult:
    """Result of a validation, the same on all ranks."""

    values: Mapping[str, float]
    """Metrics by name, from 0 to 1. The first one selects the best checkpoint."""
    n: int
    """Number of images."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Figures by name, on the main rank only."""


class DenseRecipe(HasWeights, Protocol):
    """Fields of dense recipes: `Detection` and `Segmentation`."""

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
        """Batch norm statistics over all processes, or per process."""

    @property
    def predictions(self) -> str:
        """File or folder to score instead of training."""

    @property
    def eval_every_epochs(self) -> int:
        """Epochs between validations."""

    @property
    def run(self) -> RunSettings:
        """Length, precision, logs and checkpoints."""


class Task(Protocol):
    """The part of a dense protocol that depends on the task."""

    def network(self, backbone: Backbone, classes: int) -> nn.Module:
        """Build the network on a backbone that is on the CPU and in training mode."""

    def objective(self, state: TrainState, batch: DenseBatch) -> LossAndLogs:
        """Return loss and logged scalars of a batch. Calls state.model under state.autocast()."""

    def evaluate(self, state: TrainState, val: DenseLoader) -> DenseResult:
        """Return exact metrics over the validation data.

        All ranks call it, with the network in evaluation mode and without gradients.
        """

    def identity(self) -> dict[str, object]:
        """Return, as JSON, what determines the weights besides data, optimiser and schedule."""


R = TypeVar("R", bound=DenseRecipe)


def run(recipe: R, rank: Rank, make: Callable[[R], Task]) -> Path:
    """Train, validate and write the run folder. Resumes if the folder has checkpoints.

    Args:
        recipe: Detection or segmentation.
        rank: All ranks call.
        make: Builds the task, given the recipe after `scaled`.

    Returns:
        The run folder.

    Raises:
        ValueError: The weights, data and recipe do not fit together.
        Stopped: A signal ended the run after a checkpoint.
    """
    recipe = scaled(recipe, rank)
    if recipe.run.cuda_graph:
        raise ValueError(f"{recipe.name} cannot use CUDA graphs: pass --run.no-cuda-graph")
    check_sync_bn(recipe.sync_bn, rank, recipe.run)
    task = make(recipe)
    with open_run(recipe, rank, _open) as job:
        assert job.val is not None
        if job.loader.classes != job.val.classes:
            raise ValueError("training and validation data have different classes")
        backbone, sha = load_frozen_backbone(recipe.backbone, recipe.weights, rank)
        module = task.network(backbone.cpu().requires_grad_(True).train(), len(job.loader.classes))
        module = convert_sync_bn(module, recipe.sync_bn, rank, recipe.run)
        module = channels_last(module, rank.device)
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


def score_predictions(recipe: R, rank: Rank, count: Callable[[DenseLoader], DenseResult]) -> Path:
    """Score predictions in files on the validation data, and write the run folder.

    The results page lists them under trained weights, or under `recipe.weights` if that is
    "random" or "imagenet".

    Args:
        recipe: Names the validation data and the files.
        rank: All ranks call.
        count: Reads and scores the files; returns the same on all ranks.

    Returns:
        The run folder.
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
def no_cudnn_benchmark() -> Iterator[None]:
    """Turn off cuDNN's benchmark mode, which would time kernels again for nearly every image."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def scaled(recipe: R, rank: Rank) -> R:
    """Return the recipe for this number of processes: the same images per epoch, a scaled rate.

    `train.steps_per_epoch` is for `optim.reference_batch` images per step. With 1/k of these, an
    epoch has k times as many steps, and `Optim.lr_for` gives 1/k of the learning rate (Goyal et al.
    2017, section 2.1). If `run.accumulate` sums the gradients of several steps, the rate is for all
    their images. Milestones and warm-up are in epochs and stay as they are.
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
    """Train to the end. Return the validation of the final weights."""
    last: tuple[int, DenseResult] | None = None  # only the last: figures are large

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
    if last is None or last[0] != state.step:  # max_steps ended it mid-epoch
        validate(0)
    assert last is not None
    return last[1]


def evaluate(task: Task, state: TrainState, val: DenseLoader) -> DenseResult:
    """Validate the current weights; all ranks call."""
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
    logger.info("digest of all sample ids and crop boxes: %s", state.digest)
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
