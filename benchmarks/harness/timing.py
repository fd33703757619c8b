"""Timed windows (wall and CPU time), ABBA order, memory of a process and its workers."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

WARMUP_BATCHES = 6
"""Batches taken before the clock starts. No engine prefetches as many, so a window counts no batch
that was decoded before it began."""

_TICKS = os.sysconf("SC_CLK_TCK")


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

    `RUSAGE_CHILDREN` counts a child only after it has been waited for. Living ones are read from
    /proc, whose clock ticks a hundred times a second.
    """
    dead = resource.getrusage(resource.RUSAGE_CHILDREN)
    alive = 0
    for process in descendants():
        fields = _stat(process)
        # utime, stime, cutime and cstime (its own dead children).
        alive += sum(map(int, fields[11:15])) if fields else 0
    return time.process_time() + dead.ru_utime + dead.ru_stime + alive / _TICKS


def descendants() -> list[int]:
    """Return the process ids of all living descendants."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            parents.setdefault(int(fields[1]), []).append(int(entry))
    found, queue = [], [os.getpid()]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def memory_mib() -> dict[str, float]:
    """Return memory in MiB: `rss_mib` and `peak_rss_mib`.

    `rss_mib` is the present memory of this process and its workers; shared memory is divided among
    its users. `peak_rss_mib` is the peak of this process alone.
    """
    own = _fields(Path("/proc/self/status"))
    shared = 0.0
    for process in (os.getpid(), *descendants()):
        try:
            shared += _fields(Path(f"/proc/{process}/smaps_rollup")).get("Pss", 0.0)
        except (FileNotFoundError, ProcessLookupError):
            continue  # It ended in the meantime.
    return {"rss_mib": round(shared / 1024, 1), "peak_rss_mib": round(own["VmHWM"] / 1024, 1)}


def _fields(path: Path) -> dict[str, float]:
    """Return the lines `Name:  123 kB` of a file in /proc, by name."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): float(words[1]) for words in lines if words[-1] == "kB"}


def _stat(process: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; empty if the process has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()
