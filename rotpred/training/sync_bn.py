"""Synchronised batch norm: statistics over all processes."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from rotpred.distributed import Rank
from rotpred.training.optim import from_apex
from rotpred.training.settings import RunSettings, SyncBn

M = TypeVar("M", bound=nn.Module)


def convert_sync_bn(model: M, kind: SyncBn, rank: Rank, run: RunSettings) -> M:
    """Replace the batch norm layers, in place, by synchronised ones.

    "off", or a job of one process, returns the model unchanged.

    Raises:
        ValueError: As `check_sync_bn`, or apex is not installed.
    """
    check_sync_bn(kind, rank, run)
    if kind == "off" or rank.world == 1:
        return model
    if kind == "apex":
        convert = from_apex("parallel", "convert_syncbn_model", "sync_bn=apex")
        return convert(model)  # type: ignore[no-any-return]
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return, no-untyped-call]


def check_sync_bn(kind: SyncBn, rank: Rank, run: RunSettings) -> None:
    """Check that synchronised batch norm is possible, before opening data takes minutes.

    One process has nothing to synchronise. Does not check whether apex is installed.

    Raises:
        ValueError: There are several processes without GPUs, or `run` sets cuda_graph or compile.
    """
    if kind == "off" or rank.world == 1:
        return
    if rank.device.type != "cuda":
        raise ValueError(f"sync_bn={kind} needs GPUs: on a CPU pass --sync-bn off")
    if run.cuda_graph:
        raise ValueError(
            f"run.cuda_graph cannot capture the collectives of sync_bn={kind}: pass "
            "--sync-bn off or --run.no-cuda-graph"
        )
    if run.compile:
        # Dynamo breaks the graph in every such layer and gives up after eight of them.
        raise ValueError(
            f"run.compile cannot compile the layers of sync_bn={kind}: pass --sync-bn off or "
            "--run.no-compile"
        )
