"""Opening of the training data, and checks that all ranks agree on them."""

from __future__ import annotations

from pipelines.loader import Loader, open_loader
from pipelines.spec import LoaderSpec
from rotpred.distributed import Rank, check_equal
from rotpred.training.loader_interface import TrainingLoader
from rotpred.training.settings import RunSettings


def open_data(spec: LoaderSpec, rank: Rank, run: RunSettings) -> Loader:
    """Open this rank's shard of the data; batches have the dtype of the run's precision."""
    return open_loader(spec, shard=rank.shard, device=rank.device, precision=run.precision)


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
