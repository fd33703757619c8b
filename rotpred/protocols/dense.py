"""Training and results that detection and segmentation share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipelines.datasets.annotations import DenseSamples
from pipelines.dense.batch import DenseBatch
from pipelines.dense.loader import DenseLoader, open_dense
from pipelines.dense.spec import DenseSpec
from pipelines.imaging.torchvision_decode import decode
from pipelines.spec import Precision
from rotpred.distributed import Rank
from rotpred.models.base import Backbone
from rotpred.models.memory_format import channels_last
from rotpred.protocols.run import Run, open_folder, open_run
from rotpred.protocols.scoring import Validation
from rotpred.recipes.detection import Detection
from rotpred.recipes.segmentation import Segmentation
from rotpred.records.log import read_rows
from rotpred.training.state import LossAndLogs, OptimizedPart, TrainState
from rotpred.training.sync_bn import convert_sync_bn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

R = TypeVar("R", Detection, Segmentation)


class Task(Protocol):
    """The part of a dense protocol that depends on the task."""

    def network(self, backbone: Backbone, classes: int) -> nn.Module:
        """Build the network on a backbone that is on the CPU and in training mode."""

    def objective(self, state: TrainState, batch: DenseBatch) -> LossAndLogs:
        """Return loss and logged scalars of a batch. Calls state.model under state.autocast()."""

    def evaluate(self, state: TrainState, val: DenseLoader) -> Validation:
        """Return exact metrics over the validation data.

        All ranks call it, with the network in evaluation mode and without gradients.
        """

    def score(self, predictions: Path, val: DenseLoader, rank: Rank) -> Validation:
        """Return exact metrics of the predictions in a file or folder.

        All ranks call it, and get the same.

        Raises:
            FileNotFoundError: There is no such file, or an image has none.
            ValueError: A prediction is damaged or does not fit the data; the message names it.
        """

    def identity(self) -> dict[str, object]:
        """Return, as JSON, what determines the weights besides data, optimiser and schedule."""


def images_of(samples: DenseSamples, chosen: Iterable[int]) -> list[npt.NDArray[np.uint8]]:
    """Decode the stored images at some positions, for a figure: uint8 (h, w, 3) each."""
    decoded = [decode(samples.path(i).read_bytes()) for i in chosen]
    return [image.permute(1, 2, 0).numpy() for image in decoded]


def validation(values: Mapping[str, float], n: int, figures: Mapping[str, Figure]) -> Validation:
    """Return a `Validation` whose first metric selects the best checkpoint."""
    return Validation(values, n, next(iter(values.values())), logged=values, figures=figures)


def run(recipe: R, rank: Rank, task: Task) -> Path:
    """Train, validate and write the run folder. Resumes if the folder has checkpoints.

    Args:
        recipe: Detection or segmentation.
        rank: All ranks call.
        task: The part that depends on the recipe's type.

    Returns:
        The run folder.

    Raises:
        ValueError: The weights, data and recipe do not fit together.
        Stopped: A signal ended the run after a checkpoint.
    """
    recipe = scaled(recipe, rank)
    if recipe.run.cuda_graph:
        raise ValueError(f"{recipe.name} cannot use CUDA graphs: pass --run.no-cuda-graph")
    with open_run(recipe, rank, open_dense_data) as run:
        if run.train.classes != run.val.classes:
            raise ValueError("training and validation data have different classes")
        backbone = run.backbone.cpu().requires_grad_(True).train()
        module = task.network(backbone, len(run.train.classes))
        module = convert_sync_bn(module, recipe.sync_bn, rank, recipe.run)
        module = channels_last(module, rank.device)
        state = run.train_state(
            module.train(),
            [OptimizedPart(module, recipe.optim, recipe.schedule)],
            sync_bn=recipe.sync_bn,
            optim=recipe.optim,
            schedule=recipe.schedule,
            **task.identity(),
        )
        if run.resume(state):
            logger.info(
                "%s: %s (%s) on %s x %d, %d images, %d steps of %d",
                recipe.name, recipe.backbone, recipe.weights, rank.device.type, rank.world,
                len(run.train.samples), run.total, recipe.train.batch_size * rank.world,
            )  # fmt: skip
            found = run.fit(
                state,
                lambda batch: task.objective(state, batch),
                lambda: task.evaluate(state, run.val),
            )
            assert found is not None
            _write_results(run, found)
    return run.out


def score_predictions(recipe: Detection | Segmentation, rank: Rank, task: Task) -> Path:
    """Score predictions in files on the validation data, and write the run folder.

    The results page lists them under trained weights, or under `recipe.weights` if that is
    "random" or "imagenet".

    Args:
        recipe: Names the validation data and the files.
        rank: All ranks call.
        task: Reads and scores the files.

    Returns:
        The run folder.

    Raises:
        FileNotFoundError: As `Task.score`.
        ValueError: As `Task.score`.
    """
    assert recipe.predictions is not None
    path = Path(recipe.predictions)
    out = recipe.run.out or f"runs/{recipe.name}_predictions"
    with (
        open_folder(recipe, rank, out=out) as run,
        open_dense_data(recipe.val, rank, recipe.run.precision) as val,
    ):
        run.val, found = val, task.score(path, val, rank)
        run.about = {"weights": Path(recipe.weights or path).name, "predictions": path.name}
        run.start(0, repeat=True)  # the files may have changed
        run.results(found)
        for name, figure in found.figures.items():
            run.log.figure(name, figure)
    return run.out


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
    return replace(recipe, train=replace(recipe.train, steps_per_epoch=steps_now))


def open_dense_data(spec: DenseSpec, rank: Rank, precision: Precision) -> DenseLoader:
    """Open this rank's shard of the data."""
    return open_dense(spec, shard=rank.shard, device=rank.device, precision=precision)


def _write_results(run: Run[DenseLoader], found: Validation) -> None:
    run.results(found)
    if not run.rank.main:
        return
    rows = read_rows(run.out / "log.jsonl")
    for metric, name, unit in (
        ("training speed", "images_per_s", "images/s"),
        ("waiting for data", "data_wait_percent", "% of the time"),
        ("memory of the process", "rss_mib", "MiB"),
        ("memory of the GPU, peak", "cuda_peak_mib", "MiB"),
    ):
        if values := [v for row in rows if isinstance(v := row.get(name), int | float)]:
            middle = float(max(values) if unit == "MiB" else median(values))
            about: dict[str, Any] = {"unit": unit, "n": len(values), **run.about}
            run.log.result(run.recipe.name, metric=metric, value=middle, **about)
