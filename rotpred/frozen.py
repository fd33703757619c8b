"""What evaluations on extracted features set up alike: folder, weights, features, labels, log."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pipelines.catalogues import voc2007
from pipelines.spec import LoaderSpec, Precision
from rotpred.distributed import Rank, any_true
from rotpred.features import Features, FromWeights, Store, extract, load_trunk
from rotpred.runfolder import DONE, plain, write_json
from rotpred.runlog import RunLog, lock
from rotpred.scoring import Labelled, shared_classes

logger = logging.getLogger(__name__)

Labels = npt.NDArray[np.int8]


class Place(Protocol):
    """Where and in which type an evaluation works (`recipes.frozen.Place`)."""

    @property
    def out(self) -> str:
        """Run folder; empty for runs/NAME."""

    @property
    def precision(self) -> Precision:
        """Of the network."""

    @property
    def cache(self) -> str:
        """Folder of extracted features."""


class Recipe(FromWeights, Protocol):
    """What these evaluations have in common."""

    @property
    def train(self) -> LoaderSpec:
        """Data that the classifier learns from."""

    @property
    def val(self) -> LoaderSpec:
        """Data that it is tested on."""

    @property
    def run(self) -> Place:
        """Where it works."""


@dataclass(frozen=True)
class Evaluation:
    """An open evaluation: its folder is locked, its features are there."""

    recipe: Recipe
    rank: Rank
    out: Path
    train: Features
    val: Features
    sha: str
    """Checksum of the weights, "" for random ones."""

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
            "data": self.train.data_id,
            "val": self.val.data_id,
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

    def result(self, log: RunLog, metric: str, value: float, **extra: Any) -> None:
        """Add a share of one, as percent, to results.json; n is the number of test samples."""
        log.result(
            self.recipe.name,
            metric=metric,
            value=100 * value,
            unit="%",
            n=len(self.val.labels),
            checkpoint_sha256=self.sha or None,
            weights=Path(self.recipe.weights).name,
            **extra,
        )


@contextlib.contextmanager
def open_evaluation(
    recipe: Recipe, rank: Rank, *, stages: Sequence[str], store: Store = "float32"
) -> Iterator[Evaluation]:
    """Lock the run folder, extract the features or find them.

    Args:
        recipe: what to evaluate.
        rank: this process.
        stages: the features that it needs.
        store: type of the features on disk.

    Raises:
        ValueError: weights, data and recipe do not fit together, or the folder is in use, in words.
        FileNotFoundError: there are no such data or weights.
    """
    out = Path(recipe.run.out or f"runs/{recipe.name}")
    torch.manual_seed(recipe.train.seed)  # of the random control's weights
    with contextlib.ExitStack() as stack:
        if rank.main:
            stack.enter_context(lock(out, recipe.name))
        trunk, sha = load_trunk(recipe.backbone, recipe.weights, rank)
        train, val = (
            extract(
                trunk,
                spec,
                rank,
                names=stages,
                precision=recipe.run.precision,
                cache=Path(recipe.run.cache),
                store=store,
            )
            for spec in (recipe.train, recipe.val)
        )
        yield Evaluation(recipe, rank, out, train, val, sha)


def classes_of(evaluation: Evaluation) -> int:
    """Number of classes of training and test data, which must be the same by name and order.

    Raises:
        ValueError: they are not, or samples have no label.
    """
    recipe = evaluation.recipe
    return shared_classes(
        *(
            Labelled(spec.data, part.classes, part.labels.min(), part.labels.max())
            for spec, part in ((recipe.train, evaluation.train), (recipe.val, evaluation.val))
        )
    )


def share(count: int, rank: Rank) -> slice:
    """This rank's part of `count` units; neighbours stay together, as they need the same things."""
    return slice(count * rank.rank // rank.world, count * (rank.rank + 1) // rank.world)


def one_against_rest(features: Features, classes: int) -> Labels:
    """Labels of `multi_labels` from class ids: int8 (N, classes), 1 for the class, -1 elsewhere."""
    return np.where(features.labels[:, None] == np.arange(classes), 1, -1).astype(np.int8)


def multi_labels(path: str, features: Features, root: str = "") -> Labels:
    """The labels of a data set whose pictures show several classes: int8 (N, C).

    1 is present, -1 absent and 0 difficult, as in VOC's own ImageSets/Main/CLASS_SPLIT.txt.

    Args:
        path: .npy with a row for every sample of the data set, or voc2007:SPLIT.
        features: chooses the rows.
        root: the folder VOC2007, for voc2007:SPLIT.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or too few rows.
    """
    kind, _, split = path.partition(":")
    if kind == "voc2007" and split:
        if not root:
            raise ValueError(f"labels {path} need the data's root: the folder VOC2007")
        table = voc2007(root, split=split).targets
    else:
        table = np.load(path)
    if table.ndim != 2 or table.dtype != np.int8 or not np.isin(table, (-1, 0, 1)).all():
        raise ValueError(f"{path}: expected int8 (N, C) of -1, 0 and 1")
    if len(features.indices) and features.indices[-1] >= len(table):
        raise ValueError(
            f"{path} has {len(table)} rows, but the data have sample {features.indices[-1]}"
        )
    chosen: Labels = table[features.indices]
    return chosen


def labels_of(path: str, features: Features, classes: int, root: str = "") -> Labels:
    """Labels int8 (N, C) from a file, or from the class ids where no file is named.

    Raises:
        ValueError: there are neither.
    """
    if path:
        return multi_labels(path, features, root)
    if len(features.labels) == 0 or features.labels.min() < 0:
        raise ValueError("samples without a label, and no file of labels was named")
    return one_against_rest(features, classes)
