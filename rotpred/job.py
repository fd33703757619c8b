"""What pretraining and evaluation set up alike: data for a rank, identity, length, run log."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.loader import Loader, open_loader
from pipelines.spec import LoaderSpec, Shard
from rotpred.distributed import Rank, check_equal
from rotpred.runfolder import plain
from rotpred.runlog import RunLog
from rotpred.settings import Run

_DECIDING = ("crop", "flip", "normalize", "shuffle", "limit", "seed", "max_bad", "samples")


def open_data(spec: LoaderSpec, rank: Rank, run: Run) -> Loader:
    """This rank's part of the data, emitted in the type that the network computes in."""
    shard = Shard(rank.rank, rank.world, rank.local_world)
    return open_loader(spec, shard=shard, device=rank.device, precision=run.precision)


def check_data(loader: Loader, rank: Rank) -> None:
    """Refuse what would let ranks drift apart: other data on another machine, padded training.

    Raises:
        RuntimeError: the ranks have data of different length or content.
        ValueError: training data are padded.
    """
    if not loader.spec.drop_last:
        raise ValueError("train.drop_last must be True: a batch of padding has no loss to average")
    check_equal(len(loader), rank, what="steps in an epoch")
    check_equal(int(loader.data_id or "0", 16) >> 1, rank, what="fingerprints of the training data")


def total_steps(loader: Loader, run: Run) -> int:
    """Steps of the run, which `max_steps` may cut short."""
    total = run.epochs * len(loader)
    return total if run.max_steps is None else min(total, run.max_steps)


def identity(loader: Loader, rank: Rank, run: Run, **own: object) -> dict[str, Any]:
    """What decides the weights, as plain JSON: a checkpoint is gone on with only where it is equal.

    How fast they come (engine, workers, cadences, number of processes) is not part of it.

    Args:
        loader: training data.
        rank: its world makes the global batch.
        run: length and precision.
        own: what the protocol adds, dataclasses turned into dictionaries.
    """
    spec = asdict(loader.spec)
    deciding = {
        "data": loader.data_id,
        "global_batch": loader.spec.batch_size * rank.world,
        "epochs": run.epochs,
        "precision": run.precision,
        "accumulate": run.accumulate,
        **{name: spec[name] for name in _DECIDING},
        **own,
    }
    result = plain(deciding)
    assert isinstance(result, dict)
    return result


def open_log(out: Path, recipe: object, rank: Rank, *, total: int, start_step: int) -> RunLog:
    """The run log of this job; only the main process writes."""
    return RunLog(
        out,
        recipe=recipe,
        rank_main=rank.main,
        world=rank.world,
        total_steps=total,
        device=str(rank.device),
        start_step=start_step,
    )
