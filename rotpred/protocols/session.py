"""Session of a training run: run folder, data, checkpoints and their identity, length, log."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import nn

from pipelines.loader import Loader
from pipelines.spec import LoaderSpec
from pipelines.storage import write_json
from rotpred.distributed import Rank, any_true
from rotpred.records.folder import DONE
from rotpred.records.log import RunLog, lock
from rotpred.records.recipe_json import plain
from rotpred.training.data import check_data, open_data
from rotpred.training.loader_interface import DataSpec, TrainingLoader
from rotpred.training.settings import RunSettings
from rotpred.training.state import OptimizedPart, TrainState

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=DataSpec)
S_co = TypeVar("S_co", bound=DataSpec, covariant=True)
L = TypeVar("L", bound=TrainingLoader[object])

_VIEWS_REASONS = {
    "rotate4": "rotation prediction needs all four rotations",
    "plain": "classification needs unrotated images",
}


class TrainingRecipe(Protocol[S_co]):
    """Fields that all recipes with training share."""

    @property
    def name(self) -> str:
        """Name of the run and of the default run folder."""

    @property
    def train(self) -> S_co:
        """Training data."""

    @property
    def val(self) -> S_co | None:
        """Validation data; None for no validation."""

    @property
    def run(self) -> RunSettings:
        """Length, precision, logs and checkpoints."""


@dataclass(frozen=True)
class Job(Generic[L]):
    """An open run: the run folder is locked, the loaders are open."""

    recipe: TrainingRecipe[DataSpec]
    rank: Rank
    out: Path
    loader: L
    val: L | None

    @property
    def total(self) -> int:
        """Number of steps: all epochs, or `max_steps` if that is less."""
        total = self.recipe.run.epochs * len(self.loader)
        most = self.recipe.run.max_steps
        return total if most is None else min(total, most)

    def train_state(
        self, module: nn.Module, trained: list[OptimizedPart], **own: object
    ) -> TrainState:
        """Return the training state, with its checkpoints in the run folder.

        Args:
            module: The network, on its device.
            trained: Its parts, each with an optimiser.
            own: The protocol's fields for `identity`, with the backbone.
        """
        recipe, rank = self.recipe, self.rank
        return TrainState(
            module,
            trained,
            rank=rank,
            run=recipe.run,
            folder=self.out / "checkpoints",
            global_batch=recipe.train.batch_size * rank.world,
            identity=identity(self.loader, rank, recipe.run, **own),
        )

    @contextlib.contextmanager
    def begin(self, state: TrainState) -> Iterator[RunLog | None]:
        """Load the newest checkpoint, if there is one, and open the log.

        Yields:
            The log, which only the main process writes; None if the run is finished already.
        """
        resumed = state.resume()
        finished = False
        if resumed and self.rank.main and (self.out / DONE).exists():
            done = json.loads((self.out / DONE).read_bytes())
            finished = state.step >= self.total and done == self._done(state)
        if any_true(finished, self.rank):
            logger.info("%s is finished already (step %d)", self.out, state.step)
            yield None
            return
        with RunLog(
            self.out,
            recipe=self.recipe,
            rank_main=self.rank.main,
            world=self.rank.world,
            total_steps=self.total,
            device=str(self.rank.device),
            start_step=state.step,
        ) as log:
            yield log

    def finish(self, state: TrainState) -> None:
        """Mark the run folder as finished. Must come last."""
        if self.rank.main:
            write_json(self.out / DONE, self._done(state))

    def _done(self, state: TrainState) -> dict[str, object]:
        val = "" if self.val is None else self.val.data_id
        return {"step": state.step, "stream_digest": state.digest, "val": val}


@contextlib.contextmanager
def open_job(
    recipe: TrainingRecipe[LoaderSpec], rank: Rank, *, views: Literal["rotate4", "plain"]
) -> Iterator[Job[Loader]]:
    """Lock the run folder, seed torch, open the data.

    Raises:
        ValueError: Another job has the folder, or recipe and data do not fit together.
        FileNotFoundError: There are no such data.
        RuntimeError: The data of the ranks differ in length or content.
    """
    for spec in (recipe.train, recipe.val):
        if spec is not None and spec.views != views:
            raise ValueError(f"{_VIEWS_REASONS[views]}: views must be {views}")
    with open_run(recipe, rank, open_data) as job:
        yield job


@contextlib.contextmanager
def open_run(
    recipe: TrainingRecipe[S],
    rank: Rank,
    opener: Callable[[S, Rank, RunSettings], AbstractContextManager[L]],
) -> Iterator[Job[L]]:
    """Lock the run folder, seed torch, open the data with `opener`. Raises as `open_job` does."""
    out = Path(recipe.run.out or f"runs/{recipe.name}")
    torch.manual_seed(recipe.train.seed)
    with contextlib.ExitStack() as stack:
        if rank.main:
            stack.enter_context(lock(out, recipe.name))
        loader = stack.enter_context(opener(recipe.train, rank, recipe.run))
        val = None
        if recipe.val is not None:
            val = stack.enter_context(opener(recipe.val, rank, recipe.run))
        check_data(loader, rank)
        yield Job(recipe, rank, out, loader, val)


def identity(
    loader: TrainingLoader[object], rank: Rank, run: RunSettings, **own: object
) -> dict[str, Any]:
    """Return what determines the weights, as JSON values. It must match to resume a checkpoint.

    Settings that affect speed only are left out: engine, workers, intervals, CUDA graphs, number of
    processes.

    Args:
        loader: Training data.
        rank: Its world size gives the global batch.
        run: Length and precision.
        own: Fields that the protocol adds, dataclasses as dictionaries.
    """
    fields = {
        "data": loader.data_id,
        "global_batch": loader.spec.batch_size * rank.world,
        "epochs": run.epochs,
        "precision": run.precision,
        "accumulate": run.accumulate,
        **loader.spec.fingerprint_fields(),
        **own,
    }
    result = plain(fields)
    assert isinstance(result, dict)
    return result
