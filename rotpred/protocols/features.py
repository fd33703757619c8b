"""Features of a run's training and test data, for classifiers that read them from arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pipelines.loader import Loader
from rotpred.features.base import Features, Store
from rotpred.features.extract import extract
from rotpred.protocols.run import Run
from rotpred.training.loader_interface import LabelledLoader

L = TypeVar("L", bound=LabelledLoader)


def extract_both(
    run: Run[L], stages: Sequence[str], *, cache: str, store: Store
) -> tuple[Features, Features]:
    """Return the features of training and test data, from the cache if there; close the data.

    Args:
        run: Opened with `open_extraction_loader`.
        stages: Names of the needed stages.
        cache: Folder of the arrays.
        store: Type of the arrays.

    Raises:
        ValueError: As for `extract`.
    """
    train, val = (
        extract(
            *(run.backbone, part, run.rank), names=stages, precision=run.recipe.run.precision,
            cache=Path(cache), store=store,
        )
        for part in (run.train, run.val)
    )  # fmt: skip
    run.loaders.close()
    return train, val


def selectable(train: Loader) -> int:
    """Return the most training samples that the spec can select; fewer if class ids have gaps."""
    spec = train.spec
    chosen = spec.max_samples
    if spec.samples_per_class is not None:
        chosen = spec.samples_per_class * (train.label_range[1] + 1)
    return train.total if chosen is None else min(train.total, chosen)
