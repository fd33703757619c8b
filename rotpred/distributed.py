"""The process group: rank, world size, collectives.

Only this module reads RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE, which torchrun sets.
Without them the world size is 1: there is no process group and every function here is free.
"""

from __future__ import annotations

import inspect
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

from pipelines.spec import Shard

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Rank:
    """Rank, world size and device of this process; `local_` fields count on this machine alone."""

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
                f"LOCAL_RANK={self.local_rank} and LOCAL_WORLD_SIZE={self.local_world} contradict "
                f"each other or WORLD_SIZE={self.world}"
            )

    @property
    def main(self) -> bool:
        """True in the one process (rank 0) that logs and writes files."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """The part of every global batch that this process loads."""
        return Shard(self.rank, self.world, self.local_world)

    def part_of(self, count: int) -> slice:
        """Return this rank's contiguous part of `count` units: neighbours share inputs."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)


def init(device: str = "auto", *, timeout_seconds: float = 600.0) -> Rank:
    """Read torchrun's environment, choose the device, join the process group.

    With several processes the group uses gloo for CPU tensors. If the device is a GPU, it uses NCCL
    for CUDA tensors: flags and names are then exchanged without synchronising the GPU.

    Args:
        device: "auto" (CUDA if available), "cpu", "cuda", or, for a world size of 1, "cuda:N".
        timeout_seconds: How long a collective waits for a peer before it raises.

    Returns:
        The rank of this process.

    Raises:
        ValueError: The environment is incomplete or contradictory, or the device does not exist.
    """
    fields = _environment()
    rank = Rank(**fields, device=_device(device, fields["local_rank"], fields["world"]))
    torch.set_num_threads(cpu_threads(rank.local_world))
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

    The allowed cores are divided evenly. They come from the affinity mask, which containers and job
    schedulers narrow, not from the number of cores present. OMP_NUM_THREADS overrides this, with
    one exception: torchrun sets it to 1 if it starts several processes and the user has not set it
    (torch/distributed/run.py). Under torchrun a 1 is therefore ignored.
    """
    setting = os.environ.get("OMP_NUM_THREADS", "")
    if setting.isdigit() and int(setting) > 0:
        by_torchrun = setting == "1" and local_world > 1 and "TORCHELASTIC_RUN_ID" in os.environ
        if not by_torchrun:
            return int(setting)
    return max(1, len(os.sched_getaffinity(0)) // local_world)


@contextmanager
def process_group(device: str = "auto", *, timeout_seconds: float = 600.0) -> Iterator[Rank]:
    """Run a block between `init` and `shutdown`. The arguments are those of `init`.

    After an error on a GPU there is no shutdown: NCCL's can wait for peers that are still in a
    collective, and they are released only when this process ends.
    """
    rank = init(device, timeout_seconds=timeout_seconds)
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
    """Return the sum of `tensor` (any shape and numeric dtype) over all ranks.

    The input is not modified. With a world size of 1 the input itself is returned.
    """
    if rank.world == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def any_true(flag: bool | torch.Tensor, rank: Rank) -> bool:
    """Return whether `flag` is true on any rank; every rank gets the same answer.

    A bool (for example "a signal has arrived") costs no GPU synchronisation. A tensor of one
    element on a GPU is reduced there and read back, which waits for the GPU.
    """
    if rank.world == 1:
        return bool(flag)
    state = flag.to(torch.int32) if isinstance(flag, torch.Tensor) else torch.tensor(int(flag))
    state = state.clone()
    dist.all_reduce(state, op=dist.ReduceOp.MAX)
    return bool(state.item())


def check_equal(value: int, rank: Rank, *, what: str) -> None:
    """Check that a number, for example the steps per epoch, is the same on all ranks.

    If ranks had different numbers of steps, they would wait until the group's timeout.

    Raises:
        RuntimeError: The values differ. Raised on all ranks, with the smallest and the largest.
    """
    if rank.world == 1:
        return
    bounds = torch.tensor([value, -value])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    high, low = int(bounds[0]), -int(bounds[1])
    if low != high:
        raise RuntimeError(f"ranks disagree about {what}: from {low} to {high}")


def broadcast_str(text: str, rank: Rank) -> str:
    """Return the text of rank 0 on every rank; the other ranks' texts are ignored."""
    if rank.world == 1:
        return text
    # Bytes in tensors: broadcast_object_list would unpickle what it receives.
    data = text.encode()
    size = torch.tensor(len(data))
    dist.broadcast(size, src=0)
    buffer = torch.empty(int(size), dtype=torch.uint8)
    if rank.main:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else buffer
    if len(buffer):
        dist.broadcast(buffer, src=0)
    return bytes(buffer.tolist()).decode()


def gather_rows(tensor: torch.Tensor, rank: Rank) -> torch.Tensor:
    """Concatenate the tensors (N, ...) of all ranks to (world * N, ...), in rank order.

    N must be the same on every rank, as it is with padded batches.
    """
    if rank.world == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(rank.world)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def barrier(rank: Rank) -> None:
    """Wait until every rank has called this. Work queued on GPUs may still be running."""
    any_true(False, rank)


def data_parallel(module: nn.Module, rank: Rank) -> DistributedDataParallel:
    """Wrap a module so that its gradients are averaged during backward. Save the bare module."""
    # No broadcast of buffers: training does not read batch norm's running statistics, and
    # `TrainState.sync_buffers` broadcasts them before anything does.
    names = inspect.signature(DistributedDataParallel).parameters
    # Renamed in torch 2.15, where the old name warns.
    switch = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {switch: False, "gradient_as_bucket_view": True}
    if rank.device.type == "cuda":
        options["device_ids"] = [rank.device.index]
    return DistributedDataParallel(module, **options)


def _environment() -> dict[str, int]:
    """Return the fields of `Rank` that torchrun sets, or those of a single process."""
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
    """Return the device of this process for a device name."""
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
            raise ValueError(f"device {name!r} names one GPU for {world} processes: use cuda")
        if not name[5:].isdigit():
            raise ValueError(f"unknown device {name!r}: expected auto, cpu, cuda or cuda:N")
        index = int(name[5:])
    if index >= count:
        raise ValueError(
            f"this process needs GPU {index}, but torch sees {count}: start at most {count} "
            "processes per machine (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", index)
