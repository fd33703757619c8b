"""Session of an evaluation on extracted features: run folder, weights, data, features, log."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from pipelines.loader import Loader
from pipelines.spec import LoaderSpec, Precision
from pipelines.storage import write_json
from rotpred.distributed import Rank, any_true
from rotpred.features.base import Features, Store
from rotpred.features.extract import extract, open_extraction_loader
from rotpred.models.base import Backbone
from rotpred.records.folder import DONE
from rotpred.records.former_names import translate_names
from rotpred.records.log import RunLog, lock
from rotpred.records.recipe_json import plain
from rotpred.weights.frozen_backbone import HasWeights, load_frozen_backbone

logger = logging.getLogger(__name__)


class FeatureRunSettings(Protocol):
    """Run folder, precision and feature cache, as in `recipes.base.CachedFeatureRun`."""

    @property
    def out(self) -> str:
        """Run folder; empty for runs/NAME."""

    @property
    def precision(self) -> Precision:
        """Autocast type of the network."""

    @property
    def cache(self) -> str:
        """Folder of extracted features."""


class FeatureRecipe(HasWeights, Protocol):
    """Fields that recipes of evaluations on features share."""

    @property
    def train(self) -> LoaderSpec:
        """Training data of the classifier."""

    @property
    def val(self) -> LoaderSpec:
        """Test data."""

    @property
    def run(self) -> FeatureRunSettings:
        """Run folder, precision and feature cache."""


@dataclass(frozen=True)
class FeatureSession:
    """An open evaluation: the run folder is locked, the loaders are open."""

    recipe: FeatureRecipe
    rank: Rank
    out: Path
    backbone: Backbone
    sha: str
    """SHA-256 of the weights, "" for random ones."""
    data: tuple[Loader, Loader]
    """Open training and test data, so that misfits are found before the long extraction."""
    loaders: contextlib.ExitStack
    """ExitStack that owns both loaders."""

    @property
    def samples(self) -> int:
        """Most training samples that the spec can select; fewer if class ids have gaps."""
        part = self.data[0]
        spec = part.spec
        chosen = spec.max_samples
        if spec.samples_per_class is not None:
            chosen = spec.samples_per_class * (part.label_range[1] + 1)
        return part.total if chosen is None else min(part.total, chosen)

    def features(
        self, stages: Sequence[str], store: Store = "float32"
    ) -> tuple[Features, Features]:
        """Return the features of training and test data, from the cache if there; close the data.

        Args:
            stages: Names of the needed stages.
            store: Type of the features on disk.

        Raises:
            ValueError: As for `extract`.
        """
        run = self.recipe.run
        found = [
            extract(
                self.backbone,
                part,
                self.rank,
                names=stages,
                precision=run.precision,
                cache=Path(run.cache),
                store=store,
            )
            for part in self.data
        ]
        self.loaders.close()
        return found[0], found[1]

    @contextlib.contextmanager
    def begin(self, units: int) -> Iterator[RunLog | None]:
        """Open the log; mark the run folder as finished at the end.

        Args:
            units: Units of work over all processes, for the progress bar.

        Yields:
            The log, which only the main process writes; None if the run is finished already.
        """
        rank, done = self.rank, self.out / DONE
        identity = {
            "recipe": plain(self.recipe),
            "weights": self.sha,
            "data": self.data[0].data_id,
            "val": self.data[1].data_id,
        }
        finished = (
            rank.main
            and done.exists()
            and translate_names(json.loads(done.read_bytes())) == identity
        )
        if any_true(finished, rank):
            logger.info("%s is finished already", self.out)
            yield None
            return
        with RunLog(
            self.out,
            recipe=self.recipe,
            rank_main=rank.main,
            world=rank.world,
            total_steps=-(-units // rank.world),
            device=str(rank.device),
        ) as log:
            yield log
            if rank.main:
                write_json(done, identity)

    def result(self, log: RunLog, metric: str, value: float, *, n: int, **extra: Any) -> None:
        """Add a value from 0 to 1, as percent, to results.json; `n` counts the test samples."""
        log.result(
            self.recipe.name,
            metric=metric,
            value=100 * value,
            unit="%",
            n=n,
            checkpoint_sha256=self.sha or None,
            weights=Path(self.recipe.weights).name,
            **extra,
        )


@contextlib.contextmanager
def open_evaluation(recipe: FeatureRecipe, rank: Rank) -> Iterator[FeatureSession]:
    """Lock the run folder, load the weights, open the data.

    Args:
        recipe: The evaluation.
        rank: All ranks call.

    Raises:
        ValueError: The weights, data and recipe do not fit together, or another job has the folder.
        FileNotFoundError: There are no such data or weights.
    """
    out = Path(recipe.run.out or f"runs/{recipe.name}")
    torch.manual_seed(recipe.train.seed)  # for the random control's weights
    with contextlib.ExitStack() as stack:
        if rank.main:
            stack.enter_context(lock(out, recipe.name))
        backbone, sha = load_frozen_backbone(recipe.backbone, recipe.weights, rank)
        loaders = stack.enter_context(contextlib.ExitStack())
        train, val = (
            loaders.enter_context(open_extraction_loader(spec, rank, recipe.run.precision))
            for spec in (recipe.train, recipe.val)
        )
        yield FeatureSession(recipe, rank, out, backbone, sha, (train, val), loaders)


def shard_slice(count: int, rank: Rank) -> slice:
    """Return this rank's contiguous part of `count` units: neighbours share inputs."""
    return slice(count * rank.rank // rank.world, count * (rank.rank + 1) // rank.world)
