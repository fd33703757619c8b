"""The process group: rank, world size, collectives.

Only this module reads RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE, which torchrun sets.
Without them the world size is 1: there is no process group and every function here is free.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.spec import Shard

T = TypeVar("T")

VARIABLES = {
    "RANK": "rank",
    "LOCAL_RANK": "local_rank",
    "WORLD_SIZE": "world",
    "LOCAL_WORLD_SIZE": "local_world",
}
"""Torchrun's environment variables, and the fields of `Rank` that they give."""


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


@contextmanager
def process_group(device: str = "auto", *, timeout_seconds: float = 600.0) -> Iterator[Rank]:
    """Read torchrun's environment, choose the device, join the process group for a block.

    With several processes the group uses gloo for CPU tensors. If the device is a GPU, it uses NCCL
    for CUDA tensors: flags and names are then exchanged without synchronising the GPU.

    After an error on a GPU the group is not left: NCCL can wait for peers that are still in a
    collective, and they are released only when this process ends.

    Args:
        device: "auto" (CUDA if available), "cpu", "cuda", or, for a world size of 1, "cuda:N".
        timeout_seconds: How long a collective waits for a peer before it raises.

    Yields:
        The rank of this process.

    Raises:
        ValueError: The environment is incomplete or contradictory, or the device does not exist.
    """
    fields = _environment()
    rank = Rank(
        **fields, device=_device(device, fields.get("local_rank", 0), fields.get("world", 1))
    )
    torch.set_num_threads(cpu_threads(rank.local_world))
    on_gpu = rank.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank.device)
        torch.backends.cudnn.benchmark = True  # shapes do not change within a run
    if rank.world > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            device_id=rank.device if on_gpu else None,
        )
    completed = False
    try:
        yield rank
        completed = True
    finally:
        if dist.is_initialized() and (completed or not on_gpu):
            dist.destroy_process_group()


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


def all_sum(tensor: torch.Tensor, rank: Rank) -> torch.Tensor:
    """Return the sum of `tensor` (any shape and numeric dtype) over all ranks.

    The input is not modified. With a world size of 1 the input itself is returned.
    """
    if rank.world == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def any_true(flag: bool, rank: Rank) -> bool:
    """Return whether `flag` is true on any rank; every rank gets the same answer.

    Does not wait for a GPU.
    """
    if rank.world == 1:
        return flag
    state = torch.tensor(int(flag))
    dist.all_reduce(state, op=dist.ReduceOp.MAX)
    return bool(state)


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


def from_main(work: Callable[[], T], rank: Rank, *, error: type[ValueError] = ValueError) -> T:
    """Call `work` on rank 0 alone, and return its result on every rank.

    Args:
        work: Returns JSON values, without tuples.
        rank: All ranks call.
        error: If the work raises it, all ranks raise it, with the same message.
    """
    if rank.world == 1:
        return work()
    message: dict[str, Any] = {}
    if rank.main:
        try:
            message["result"] = work()
        except error as problem:
            message["error"] = str(problem)
    # Bytes in tensors: broadcast_object_list would unpickle what it receives.
    data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    size = torch.tensor(len(data))
    dist.broadcast(size, src=0)
    if not rank.main:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, src=0)
    message = json.loads(bytes(data.tolist()))
    if "error" in message:
        raise error(message["error"])
    result: T = message["result"]
    return result


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
    """Return the fields of `Rank` that torchrun sets; none for a single process."""
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not found:
        return {}
    if len(found) < len(VARIABLES):
        lacking = ", ".join(name for name in VARIABLES if name not in found)
        raise ValueError(
            f"{', '.join(found)} set but not {lacking}: start with torchrun, which sets all four, "
            "or unset them to run as a single process"
        )
    for name, text in found.items():
        if not text.isdigit():
            raise ValueError(f"{name}={text!r} is not a whole number")
    return {VARIABLES[name]: int(text) for name, text in found.items()}


def _device(name: str, local_rank: int, world: int) -> torch.device:
    """Return the device of this process for a device name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise ValueError(f"unknown device {name!r}: expected auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(f"device {name!r} was asked for, but torch sees no CUDA device")
    if name != "cuda" and world > 1:
        raise ValueError(f"device {name!r} names one GPU for {world} processes: use cuda")
    index = local_rank if name == "cuda" else int(name[5:])
    if index >= count:
        raise ValueError(
            f"this process needs GPU {index}, but torch sees {count}: start at most {count} "
            "processes per machine (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", index)
