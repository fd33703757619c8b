"""How every protocol opens a run, trains, reports results and marks the run as finished.

    with open_run(recipe, rank, open_data) as run:
        state = run.train_state(network, parts)
        if run.resume(state):
            found = run.fit(state, objective, lambda: evaluate(state, run.val))
            run.result("accuracy", found.results["accuracy"], n=found.n)

An evaluation that trains nothing calls `run.start` in place of `resume` and `fit`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from pipelines.spec import Precision
from pipelines.storage import read_json, write_json
from rotpred.distributed import Rank, from_main
from rotpred.models.base import Backbone
from rotpred.plots.training import curves
from rotpred.protocols.scoring import Validation
from rotpred.recipes.base import FromWeights, Recipe, Trained
from rotpred.records.folder import DONE, what_counts
from rotpred.records.log import RunLog, lock, read_rows
from rotpred.records.recipe_json import plain
from rotpred.training.data import check_data
from rotpred.training.loader_interface import TrainingLoader
from rotpred.training.loop import steps
from rotpred.training.state import LossAndLogs, OptimizedPart, TrainState
from rotpred.training.sync_bn import check_sync_bn
from rotpred.weights.frozen_backbone import load_frozen_backbone

logger = logging.getLogger(__name__)

L = TypeVar("L", bound=TrainingLoader[Any])

Opener = Callable[[Any, Rank, Precision], contextlib.AbstractContextManager[L]]
"""Opens the data of a spec: `open_data`, `open_extraction_loader` or `open_dense_data`."""


class Run(Generic[L]):
    """An open run: the run folder is locked, the data and the backbone are open."""

    train: L
    """Training data; not set if the recipe has none."""
    val: L
    """Validation or test data; not set if the recipe has none."""
    backbone: Backbone
    """Frozen, on the device; only for recipes with weights."""
    sha = ""
    """SHA-256 of the weights of the backbone; "" for random ones."""
    log: RunLog
    """The log; open once `start` or `resume` has returned True."""

    def __init__(self, recipe: Recipe, rank: Rank, out: Path) -> None:
        """Open nothing: `open_run` and `open_folder` do."""
        self.recipe, self.rank, self.out = recipe, rank, out
        self.about: dict[str, Any] = {}
        """Fields that all results share: name and checksum of the weights."""
        self.loaders = contextlib.ExitStack()
        """Closes the data; a protocol may do so before the run ends."""
        self._log = contextlib.ExitStack()
        self._done: Callable[[], Mapping[str, object]] | None = None

    def name_weights(self, weights: str | None, sha: str) -> None:
        """Set name and checksum of the weights for all results; `sha` is "" for random ones."""
        self.sha = sha
        self.about = {"checkpoint_sha256": sha or None, "weights": Path(weights or "").name}

    def start(self, total_steps: int, *, repeat: bool = False) -> bool:
        """Open the log of an evaluation, unless it is finished already.

        Args:
            total_steps: Length of the progress bar.
            repeat: Evaluate again even so.

        Returns:
            Whether there is something to do, the same on all ranks.
        """
        done = {"recipe": plain(self.recipe), "weights": self.sha}
        for key, part in (("data", "train"), ("val", "val")):
            if hasattr(self, part):
                done[key] = getattr(self, part).data_id
        return self._start(total_steps, lambda: done, may_be_finished=not repeat)

    def _start(
        self,
        total_steps: int,
        done: Callable[[], Mapping[str, object]],
        *,
        start_step: int = 0,
        may_be_finished: bool,
    ) -> bool:
        """Open the log, unless `may_be_finished` and done.json has the content of `done`."""
        path = self.out / DONE

        def finished() -> bool:
            return path.exists() and what_counts(read_json(path, dict)) == what_counts(done())

        if may_be_finished and from_main(finished, self.rank):
            logger.info("%s is finished already", self.out)
            return False
        self.log = self._log.enter_context(
            RunLog(self.out, self.recipe, self.rank, total_steps, start_step=start_step)
        )
        self._done = done
        return True

    @property
    def total(self) -> int:
        """Number of training steps."""
        return self._trained.run.total_steps(len(self.train))

    @property
    def _trained(self) -> Trained:
        assert isinstance(self.recipe, Trained)
        return self.recipe

    def train_state(
        self, module: nn.Module, trained: list[OptimizedPart], **own: object
    ) -> TrainState:
        """Return the training state, with its checkpoints in the run folder.

        Args:
            module: The network, on its device.
            trained: Its parts, each with an optimiser.
            own: Other fields that determine the weights, such as the optimiser. They must match to
                resume a checkpoint, like data, backbone, length and precision.

        Raises:
            ValueError: The last batch of an epoch would be padded.
            RuntimeError: The data of the ranks differ in length or content.
        """
        check_data(self.train, self.rank)
        run, spec = self._trained.run, self.train.spec
        global_batch = spec.batch_size * self.rank.world
        fields = {
            "data": self.train.data_id,
            "global_batch": global_batch,
            "epochs": run.epochs,
            "precision": run.precision,
            "accumulate": run.accumulate,
            **spec.fingerprint_fields(),
            "backbone": self.recipe.backbone,
            **({"weights": self.sha} if isinstance(self.recipe, FromWeights) else {}),
            **{name: _fields(name, value) for name, value in own.items()},
        }
        return TrainState(
            module, trained, rank=self.rank, run=run, folder=self.out / "checkpoints",
            global_batch=global_batch, identity=plain(fields),
        )  # fmt: skip

    def resume(self, state: TrainState) -> bool:
        """Load the newest checkpoint, if there is one, and open the log of the training.

        Returns:
            Whether there is something to do, as `start`.
        """
        state.resume()
        val = self.val.data_id if hasattr(self, "val") else ""
        return self._start(
            self.total,
            lambda: {"step": state.step, "stream_digest": state.digest, "val": val},
            start_step=state.step,
            may_be_finished=state.step >= self.total,
        )

    def fit(
        self,
        state: TrainState,
        objective: Callable[[Any], LossAndLogs],
        evaluate: Callable[[], Validation] | None,
        *,
        first: Callable[[Any], object] | None = None,
    ) -> Validation | None:
        """Train to the end.

        Args:
            state: From `train_state`, after `resume`.
            objective: Returns loss and logged scalars of a batch.
            evaluate: Validates the current weights; called in evaluation mode, on all ranks. None:
                no validation.
            first: Called with the first batch of a new run, on the main rank.

        Returns:
            The validation of the final weights.

        Raises:
            NotFiniteError: A loss or a weight is not finite.
            Stopped: A signal ended the run after a checkpoint.
        """
        last: tuple[int, Validation] | None = None  # only the last: figures are large
        start = state.step

        def validate(_epoch: int) -> float:
            nonlocal last
            assert evaluate is not None
            with state.evaluation():
                found = evaluate()
            last = state.step, found
            if state.step > start or not self.log.has_validation(start):
                percent = {name: 100 * value for name, value in found.logged.items()}
                self.log.validation(step=state.step, values=percent)
            for name, figure in found.figures.items():
                self.log.figure(name, figure)
            return found.score

        for batch in steps(
            state,
            self.train,
            self._trained.run,
            log=self.log,
            evaluate=None if evaluate is None else validate,
            eval_every_epochs=self._trained.eval_every_epochs,
        ):
            if first is not None and state.step == 0 and self.rank.main:
                first(batch)
            state.train_step(objective, batch)
        if evaluate is not None and (last is None or last[0] != state.step):
            validate(
                0
            )  # max_steps ended the run within an epoch, or it was cut after its last step
        logger.info("digest of all sample ids and crop boxes: %s", state.digest)
        if self.rank.main:
            self.log.figure("curves", curves(read_rows(self.out / "log.jsonl")))
        return None if last is None else last[1]

    def result(self, metric: str, value: float, *, n: int, **extra: Any) -> None:
        """Add a value from 0 to 1, as percent, to results.json; `n` counts the samples."""
        extra = self.about | extra
        self.log.result(self.recipe.name, metric=metric, value=100 * value, unit="%", n=n, **extra)

    def results(self, found: Validation, **extra: Any) -> None:
        """Add all results of a validation, as `result`."""
        for metric, value in found.results.items():
            self.result(metric, value, n=found.n, **extra)


@contextlib.contextmanager
def open_folder(recipe: Recipe, rank: Rank, *, out: str | None = None) -> Iterator[Run[Any]]:
    """Lock the run folder; open no data. Other arguments and errors: `open_run`.

    Args:
        recipe: The recipe.
        rank: All ranks call.
        out: Run folder, if it is not the recipe's.
    """
    path = Path(out or recipe.run.out or f"runs/{recipe.name}")
    with lock(path, recipe.name) if rank.main else contextlib.nullcontext():
        run = Run[Any](recipe, rank, path)
        with run.loaders, run._log:
            yield run
            if run._done is not None and rank.main:
                write_json(path / DONE, run._done())


@contextlib.contextmanager
def open_run(recipe: Recipe, rank: Rank, opener: Opener[L]) -> Iterator[Run[L]]:
    """Lock the run folder, seed torch, load the backbone, open the data.

    If the block ends without an error, a run that was started is marked as finished.

    Args:
        recipe: Data, weights if it has any, run folder.
        rank: All ranks call.
        opener: Opens `recipe.train` and `recipe.val`, where the recipe has them.

    Raises:
        ValueError: Another job has the folder, or weights, data and recipe do not fit together.
        FileNotFoundError: There are no such data or weights.
    """
    if isinstance(recipe, Trained):
        check_sync_bn(recipe.sync_bn, rank, recipe.run)
    specs = {name: getattr(recipe, name, None) for name in ("train", "val")}
    with open_folder(recipe, rank) as run:
        # For random weights, new heads and dropout.
        torch.manual_seed(next(spec.seed for spec in specs.values() if spec is not None))
        if isinstance(recipe, FromWeights):
            run.backbone, sha = load_frozen_backbone(recipe.backbone, recipe.weights, rank)
            run.name_weights(recipe.weights, sha)
        for name, spec in specs.items():
            if spec is not None:
                loader = opener(spec, rank, recipe.run.precision)
                setattr(run, name, run.loaders.enter_context(loader))
        yield run


def _fields(name: str, value: Any) -> object:
    """Return a dataclass as a dictionary; a schedule's has its kind."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return asdict(value) | ({"kind": type(value).__name__} if name == "schedule" else {})
