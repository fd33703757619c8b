"""Opening of the training data, and checks that all ranks agree on them."""

from __future__ import annotations

from typing import Literal

from pipelines.loader import Loader, open_loader
from pipelines.spec import LoaderSpec, Precision
from rotpred.distributed import Rank, check_equal
from rotpred.training.loader_interface import TrainingLoader

_VIEWS_REASONS = {
    "rotate4": "rotation prediction needs all four rotations",
    "plain": "classification needs unrotated images",
}


def open_data(spec: LoaderSpec, rank: Rank, precision: Precision) -> Loader:
    """Open this rank's shard of the data; batches have the dtype of the precision."""
    return open_loader(spec, shard=rank.shard, device=rank.device, precision=precision)


def check_views(views: Literal["rotate4", "plain"], *specs: LoaderSpec | None) -> None:
    """Raise `ValueError` if one of the specs has other views."""
    if any(spec is not None and spec.views != views for spec in specs):
        raise ValueError(f"{_VIEWS_REASONS[views]}: views must be {views}")


def check_data(loader: TrainingLoader[object], rank: Rank) -> None:
    """Check that all ranks train on the same data, without padded batches.

    Raises:
        RuntimeError: The data of the ranks differ in length or content.
        ValueError: The last batch of an epoch is padded.
    """
    if not loader.spec.drop_last:
        raise ValueError("train.drop_last must be True: a batch of padding has no loss to average")
    check_equal(len(loader), rank, what="steps in an epoch")
    check_equal(int(loader.data_id or "0", 16) >> 1, rank, what="fingerprints of the training data")
