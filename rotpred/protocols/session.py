"""What pretraining and evaluation set up alike: folder, data for a rank, identity, length, log."""

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
from rotpred.distributed import Rank, any_true
from rotpred.files import plain, write_json
from rotpred.records.folder import DONE
from rotpred.records.log import RunLog, lock
from rotpred.training.data import check_data, open_data
from rotpred.training.loader_interface import DataSpec, TrainingLoader
from rotpred.training.settings import RunSettings
from rotpred.training.state import OptimizedPart, TrainState

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=DataSpec)
S_co = TypeVar("S_co", bound=DataSpec, covariant=True)
L = TypeVar("L", bound=TrainingLoader[object])

_WHY = {
    "rotate4": "pretraining predicts rotations",
    "plain": "classification reads each image once",
}


class TrainingRecipe(Protocol[S_co]):
    """What all recipes that train have."""

    @property
    def name(self) -> str:
        """Names the default run folder."""

    @property
    def train(self) -> S_co:
        """Training data."""

    @property
    def val(self) -> S_co | None:
        """Validation data, if there are any."""

    @property
    def run(self) -> RunSettings:
        """How it is driven."""


@dataclass(frozen=True)
class Job(Generic[L]):
    """An open run: its folder is locked and its data are there."""

    recipe: TrainingRecipe[DataSpec]
    rank: Rank
    out: Path
    loader: L
    val: L | None

    @property
    def total(self) -> int:
        """Steps of the run, which `max_steps` may cut short."""
        total = self.recipe.run.epochs * len(self.loader)
        most = self.recipe.run.max_steps
        return total if most is None else min(total, most)

    def train_state(
        self, module: nn.Module, trained: list[OptimizedPart], **own: object
    ) -> TrainState:
        """What is trained, with its checkpoints in the run folder.

        Args:
            module: on its device.
            trained: its parts.
            own: as for `identity`, the backbone among it.
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
            The log, to which only the main process writes; None where the run is finished already.
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
        """Mark the folder as finished: the last thing that a run does."""
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
        ValueError: another job has the folder, or recipe and data do not fit together, in words.
        FileNotFoundError: there are no such data.
        RuntimeError: the ranks have data of different length or content.
    """
    for spec in (recipe.train, recipe.val):
        if spec is not None and spec.views != views:
            raise ValueError(f"{_WHY[views]}: views must be {views}")
    with open_run(recipe, rank, open_data) as job:
        yield job


@contextlib.contextmanager
def open_run(
    recipe: TrainingRecipe[S],
    rank: Rank,
    opener: Callable[[S, Rank, RunSettings], AbstractContextManager[L]],
) -> Iterator[Job[L]]:
    """Lock the run folder, seed torch, open the data with `opener`; raises as `open_job` does."""
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
    """What decides the weights, as plain JSON: a checkpoint is gone on with only where it is equal.

    How fast they come (engine, workers, cadences, graphs, number of processes) is not part of it.

    Args:
        loader: training data.
        rank: its world makes the global batch.
        run: length and precision.
        own: what the protocol adds, dataclasses turned into dictionaries.
    """
    fingerprint_fields = {
        "data": loader.data_id,
        "global_batch": loader.spec.batch_size * rank.world,
        "epochs": run.epochs,
        "precision": run.precision,
        "accumulate": run.accumulate,
        **loader.spec.fingerprint_fields(),
        **own,
    }
    result = plain(fingerprint_fields)
    assert isinstance(result, dict)
    return result
