"""Batch norm over all processes."""

from __future__ import annotations

from typing import Literal, TypeVar

from torch import nn

from rotpred.distributed import Rank
from rotpred.training.optim import APEX_INSTALL
from rotpred.training.settings import RunSettings

SyncBn = Literal["off", "torch", "apex"]

M = TypeVar("M", bound=nn.Module)


def synced(model: M, kind: SyncBn, rank: Rank, run: RunSettings) -> M:
    """Let batch norm take its statistics over all processes, or leave it as it is ("off").

    Raises:
        ValueError: there is no GPU, apex is not installed, or CUDA graphs or compilation are asked
            for as well.
    """
    check(kind, rank, run)
    if kind == "off":
        return model
    if kind == "apex":
        return _apex(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return, no-untyped-call]


def check(kind: SyncBn, rank: Rank, run: RunSettings) -> None:
    """Refuse what `synced` will, but for apex: before data are opened that take minutes.

    Raises:
        ValueError: there is no GPU, or CUDA graphs or compilation are asked for as well.
    """
    if kind == "off":
        return
    if rank.device.type != "cuda":
        raise ValueError(f"sync_bn={kind} needs GPUs: on a CPU pass --sync-bn off")
    if run.cuda_graph:
        raise ValueError(
            f"run.cuda_graph cannot capture what sync_bn={kind} sends between GPUs: pass "
            "--sync-bn off or --run.no-cuda-graph"
        )
    if run.compile:
        # Dynamo breaks the graph in every such layer and gives up after eight of them.
        raise ValueError(
            f"run.compile falls to pieces in the layers of sync_bn={kind}: pass --sync-bn off or "
            "--run.no-compile"
        )


def _apex(model: M) -> M:
    try:
        from apex.parallel import convert_syncbn_model
    except ImportError as error:
        raise ValueError(
            "sync_bn=apex needs NVIDIA apex, which is not installed. It is built from source "
            f"(the package apex on PyPI is something else): {APEX_INSTALL}"
        ) from error
    return convert_syncbn_model(model)  # type: ignore[no-any-return]
