"""Open the data of a run, and check them across ranks."""

from __future__ import annotations

from pipelines.loader import Loader, open_loader
from pipelines.spec import LoaderSpec, Shard
from rotpred.distributed import Rank, check_equal
from rotpred.training.loader_interface import TrainingLoader
from rotpred.training.settings import RunSettings


def open_data(spec: LoaderSpec, rank: Rank, run: RunSettings) -> Loader:
    """This rank's part of the data, emitted in the type that the network computes in."""
    shard = Shard(rank.rank, rank.world, rank.local_world)
    return open_loader(spec, shard=shard, device=rank.device, precision=run.precision)


def check_data(loader: TrainingLoader[object], rank: Rank) -> None:
    """Refuse what would let ranks drift apart: other data on another machine, padded training.

    Raises:
        RuntimeError: the ranks have data of different length or content.
        ValueError: training data are padded.
    """
    if not loader.spec.drop_last:
        raise ValueError("train.drop_last must be True: a batch of padding has no loss to average")
    check_equal(len(loader), rank, what="steps in an epoch")
    check_equal(int(loader.data_id or "0", 16) >> 1, rank, what="fingerprints of the training data")
