"""Who this process is among its peers, and the few things that all of them do together.

The only reader of RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE (torchrun sets them). Without
them the process is a world of one: no process group exists and every function here is free.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

log = logging.getLogger(__name__)

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Rank:
    """The place of this process: rank of world on all machines, local_rank on this one."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - torch.device is immutable

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"RANK={self.rank} is not in WORLD_SIZE={self.world}")
        if not 0 <= self.local_rank < self.local_world <= self.world:
            raise ValueError(
                f"LOCAL_RANK={self.local_rank} and LOCAL_WORLD_SIZE={self.local_world} do not fit "
                f"each other or WORLD_SIZE={self.world}"
            )

    @property
    def main(self) -> bool:
        """True in the one process that logs and writes files."""
        return self.rank == 0


def init(device: str = "auto", *, timeout_seconds: float = 600.0, threads: int = 0) -> Rank:
    """Read torchrun's environment, choose the device, join the process group.

    With several processes the group speaks gloo for CPU tensors, and NCCL for CUDA tensors where
    the device is a GPU: flags and names then travel without a synchronisation of the GPU.

    Args:
        device: "auto" (CUDA where there is any), "cpu", "cuda", or, in a world of one, "cuda:N".
        timeout_seconds: how long a collective waits for a peer before it raises.
        threads: CPU threads of torch in this process; 0 for the share that `cpu_threads` gives.

    Raises:
        ValueError: the environment is incomplete or contradictory, or there is no such device.
    """
    place = _environment()
    rank = Rank(**place, device=_device(device, place["local_rank"], place["world"]))
    torch.set_num_threads(threads or cpu_threads(rank.local_world))
    if rank.device.type == "cuda":
        torch.cuda.set_device(rank.device)
        torch.backends.cudnn.benchmark = True  # shapes do not change within a run
    if rank.world > 1:
        on_gpu = rank.device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            device_id=rank.device if on_gpu else None,
        )
    return rank


def cpu_threads(local_world: int = 1) -> int:
    """Return how many CPU threads one of `local_world` processes on this machine may use.

    The allowed cores (the affinity mask, which containers and job schedulers narrow; not the
    number of cores present) are shared out evenly. OMP_NUM_THREADS wins, except that torchrun sets
    it to 1 by itself when it starts more than one process and the user has not set it
    (torch/distributed/run.py), so there a 1 is not taken for the user's wish; `init(threads=1)` is.
    """
    wish = os.environ.get("OMP_NUM_THREADS", "")
    if wish.isdigit() and int(wish) > 0:
        by_torchrun = wish == "1" and local_world > 1 and "TORCHELASTIC_RUN_ID" in os.environ
        if not by_torchrun:
            return int(wish)
    return max(1, len(os.sched_getaffinity(0)) // local_world)


@contextmanager
def process_group(
    device: str = "auto", *, timeout_seconds: float = 600.0, threads: int = 0
) -> Iterator[Rank]:
    """Run a block between `init` and `shutdown`; the arguments are those of `init`.

    After an error on a GPU the group is left alone: NCCL's shutdown can wait for peers that are
    still in a collective, and what helps them is that this process ends soon.
    """
    rank = init(device, timeout_seconds=timeout_seconds, threads=threads)
    try:
        yield rank
    except BaseException:
        if rank.device.type == "cpu":
            shutdown()
        raise
    shutdown()


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_sum(tensor: torch.Tensor, rank: Rank) -> torch.Tensor:
    """Return the sum of `tensor` over all ranks; the input is left as it is.

    In a world of one the input itself is returned.
    """
    if rank.world == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def any_true(flag: bool | torch.Tensor, rank: Rank) -> bool:
    """Return whether `flag` is true on any rank: the same answer everywhere.

    A bool (a signal has arrived) costs no GPU synchronisation. A tensor of one element that lies on
    a GPU is reduced there and read back, which waits for the GPU.
    """
    if rank.world == 1:
        return bool(flag)
    state = flag.to(torch.int32) if isinstance(flag, torch.Tensor) else torch.tensor(int(flag))
    state = state.clone()
    dist.all_reduce(state, op=dist.ReduceOp.MAX)
    return bool(state.item())


def check_equal(value: int, rank: Rank, *, what: str) -> None:
    """Raise where the ranks disagree about a number, for example of steps in an epoch.

    Ranks of unequal length otherwise wait for each other until the group's timeout.

    Raises:
        RuntimeError: on all ranks, with the smallest and the largest value.
    """
    if rank.world == 1:
        return
    bounds = torch.tensor([value, -value])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    high, low = int(bounds[0]), -int(bounds[1])
    if low != high:
        raise RuntimeError(f"ranks disagree about {what}: from {low} to {high}")


def broadcast_str(text: str, rank: Rank, *, source: int = 0) -> str:
    """Return the text of rank `source` on every rank; that of the others is ignored."""
    if rank.world == 1:
        return text
    # Bytes in tensors, not broadcast_object_list: that one unpickles what arrives.
    data = text.encode()
    size = torch.tensor(len(data))
    dist.broadcast(size, src=source)
    buffer = torch.empty(int(size), dtype=torch.uint8)
    if rank.rank == source:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else buffer
    if len(buffer):
        dist.broadcast(buffer, src=source)
    return bytes(buffer.tolist()).decode()


def gather_rows(tensor: torch.Tensor, rank: Rank) -> torch.Tensor:
    """Return the tensors (N, ...) of all ranks as one (world * N, ...), in the order of the ranks.

    N must be the same everywhere, as it is with padded batches.
    """
    if rank.world == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(rank.world)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def barrier(rank: Rank) -> None:
    """Wait until every rank has come here (the hosts: work queued on GPUs may still run)."""
    any_true(False, rank)


def data_parallel(module: nn.Module, rank: Rank) -> DistributedDataParallel:
    """Gradients are averaged while the backward pass runs; the bare module is what is saved."""
    # Training does not use batch norm's statistics: `TrainState.sync_buffers` sends them where one does.
    names = inspect.signature(DistributedDataParallel).parameters
    # Renamed in torch 2.15, where the old name warns.
    switch = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {switch: False, "gradient_as_bucket_view": True}
    if rank.device.type == "cuda":
        options["device_ids"] = [rank.device.index]
    return DistributedDataParallel(module, **options)


def _environment() -> dict[str, int]:
    """Return the fields of `Rank` that torchrun gives, or those of a world of one."""
    names = ("rank", "local_rank", "world", "local_world")
    found = [name for name in VARIABLES if name in os.environ]
    if not found:
        return dict(zip(names, (0, 0, 1, 1), strict=True))
    if len(found) < len(VARIABLES):
        lacking = ", ".join(name for name in VARIABLES if name not in os.environ)
        raise ValueError(
            f"{', '.join(found)} set but not {lacking}: start with torchrun, which sets all four, "
            "or unset them to run as a single process"
        )
    values = []
    for name in VARIABLES:
        text = os.environ[name]
        if not text.isdigit():
            raise ValueError(f"{name}={text!r} is not a whole number")
        values.append(int(text))
    return dict(zip(names, values, strict=True))


def _device(name: str, local_rank: int, world: int) -> torch.device:
    """Turn the name of a device into this process's own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") and not name.startswith("cuda:"):
        raise ValueError(f"unknown device {name!r}: expected auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(f"device {name!r} was asked for, but torch sees no CUDA device")
    if name == "cuda":
        index = local_rank
    else:
        if world > 1:
            raise ValueError(f"device {name!r} names one GPU for {world} processes: say cuda")
        if not name[5:].isdigit():
            raise ValueError(f"unknown device {name!r}: expected auto, cpu, cuda or cuda:N")
        index = int(name[5:])
    if index >= count:
        raise ValueError(
            f"this process wants GPU {index}, but torch sees {count}: start at most {count} "
            "processes per machine (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", index)
