"""What evaluations on extracted features set up alike: folder, weights, data, features, log."""

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
from rotpred.distributed import Rank, any_true
from rotpred.features.base import Features, Store
from rotpred.features.extract import extract, open_images
from rotpred.files import plain, write_json
from rotpred.models.base import Backbone
from rotpred.records.folder import DONE
from rotpred.records.log import RunLog, lock
from rotpred.weights.frozen_backbone import HasWeights, load_frozen_backbone

logger = logging.getLogger(__name__)


class FeatureRunSettings(Protocol):
    """Where and in which type an evaluation works (`recipes.frozen.FeatureRunSettings`)."""

    @property
    def out(self) -> str:
        """Run folder; empty for runs/NAME."""

    @property
    def precision(self) -> Precision:
        """Of the network."""

    @property
    def cache(self) -> str:
        """Folder of extracted features."""


class FeatureRecipe(HasWeights, Protocol):
    """What these evaluations have in common."""

    @property
    def train(self) -> LoaderSpec:
        """Data that the classifier learns from."""

    @property
    def val(self) -> LoaderSpec:
        """Data that it is tested on."""

    @property
    def run(self) -> FeatureRunSettings:
        """Where it works."""


@dataclass(frozen=True)
class FeatureSession:
    """An open evaluation: its folder is locked, its data are open."""

    recipe: FeatureRecipe
    rank: Rank
    out: Path
    backbone: Backbone
    sha: str
    """Checksum of the weights, "" for random ones."""
    data: tuple[Loader, Loader]
    """Training and test data, open: what does not fit can be refused before the long work."""
    held: contextlib.ExitStack
    """What closes them."""

    @property
    def samples(self) -> int:
        """Training samples after the spec has chosen: at most, as ids may have gaps."""
        part = self.data[0]
        spec = part.spec
        chosen = spec.max_samples
        if spec.samples_per_class is not None:
            chosen = spec.samples_per_class * (part.label_range[1] + 1)
        return part.total if chosen is None else min(part.total, chosen)

    def features(
        self, stages: Sequence[str], store: Store = "float32"
    ) -> tuple[Features, Features]:
        """Extract the features of training and test data, or find them, and close the data.

        Args:
            stages: the features that are needed.
            store: type of the features on disk.

        Raises:
            ValueError: as `extract`.
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
        self.held.close()
        return found[0], found[1]

    @contextlib.contextmanager
    def begin(self, units: int) -> Iterator[RunLog | None]:
        """Open the log, and mark the folder as finished in the end.

        Args:
            units: of work, over all processes, for the progress bar.

        Yields:
            The log, to which only the main process writes; None where all is finished already.
        """
        rank, done = self.rank, self.out / DONE
        identity = {
            "recipe": plain(self.recipe),
            "weights": self.sha,
            "data": self.data[0].data_id,
            "val": self.data[1].data_id,
        }
        finished = rank.main and done.exists() and json.loads(done.read_bytes()) == identity
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
        """Add a share of one, as percent, to results.json; `n` is the number of test samples."""
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
        recipe: what to evaluate.
        rank: this process.

    Raises:
        ValueError: weights, data and recipe do not fit together, or the folder is in use, in words.
        FileNotFoundError: there are no such data or weights.
    """
    out = Path(recipe.run.out or f"runs/{recipe.name}")
    torch.manual_seed(recipe.train.seed)  # of the random control's weights
    with contextlib.ExitStack() as stack:
        if rank.main:
            stack.enter_context(lock(out, recipe.name))
        backbone, sha = load_frozen_backbone(recipe.backbone, recipe.weights, rank)
        held = stack.enter_context(contextlib.ExitStack())
        train, val = (
            held.enter_context(open_images(spec, rank, recipe.run.precision))
            for spec in (recipe.train, recipe.val)
        )
        yield FeatureSession(recipe, rank, out, backbone, sha, (train, val), held)


def share(count: int, rank: Rank) -> slice:
    """This rank's part of `count` units; neighbours stay together, as they need the same things."""
    return slice(count * rank.rank // rank.world, count * (rank.rank + 1) // rank.world)
