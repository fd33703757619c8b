"""Timed windows (wall and CPU time), ABBA order, memory of a process and its workers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import psutil

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

WARMUP_BATCHES = 6
"""Batches taken before the clock starts. No engine prefetches as many, so a window counts no batch
that was decoded before it began."""


class Window(NamedTuple):
    """One measurement: images delivered, wall time, CPU time."""

    images: int
    """Source images, not views; or whatever else was counted."""
    seconds: float
    """Wall time."""
    cpu_seconds: float
    """User and system time of all threads of this process and its worker processes."""


def abba(names: Sequence[T], repeats: int) -> list[T]:
    """Return every name `repeats` times: forwards, backwards, forwards, ...

    If the machine slows down (heat, neighbours), this does not favour the first contestant.
    """
    return [name for k in range(repeats) for name in (names if k % 2 == 0 else reversed(names))]


def window(batches: Iterator[int], *, seconds: float, device: torch.device) -> Window:
    """Take batches for about `seconds`, at least one, and return the measurement.

    The device is synchronized before the clock starts and before it stops.

    Args:
        batches: Yields the number of images of each batch.
        seconds: Minimum length of the window.
        device: Device that does the work.
    """
    synchronize(device)
    images, cpu, begin = 0, cpu_seconds(), time.perf_counter()
    for count in batches:
        images += count
        if time.perf_counter() - begin >= seconds:
            break
    synchronize(device)
    return Window(images, time.perf_counter() - begin, cpu_seconds() - cpu)


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on a GPU; do nothing on a CPU."""
    if device.type == "cuda":
        # Imported here: processes that measure their memory do not need torch.
        import torch

        torch.cuda.synchronize(device)


def cpu_seconds() -> float:
    """Return user and system time of this process, its dead children and its living descendants.

    A child counts among the dead only after it has been waited for. Times of other processes tick a
    hundred times a second.
    """
    own = psutil.Process()
    dead = own.cpu_times()
    total = time.process_time() + dead.children_user + dead.children_system
    for process in own.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended in the meantime
            total += sum(process.cpu_times()[:4])  # user, system and those of its dead children
    return total


def memory_mib() -> dict[str, float]:
    """Return memory in MiB: `rss_mib` and `peak_rss_mib`.

    `rss_mib` is the present memory of this process and its workers; shared memory is divided among
    its users. `peak_rss_mib` is the peak of this process alone.
    """
    own = psutil.Process()
    shared = 0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended in the meantime
            shared += process.memory_full_info().pss
    # Not ru_maxrss: that includes the memory of the parent before exec.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0])
    return {"rss_mib": round(shared / 2**20, 1), "peak_rss_mib": round(peak / 1024, 1)}
