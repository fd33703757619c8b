"""Windows of wall and processor time, their order, and the memory of a process and its workers."""

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
"""Batches that are taken before the clock starts: more than any engine keeps prepared, so that a
window holds no batch that was decoded before it began."""

_TICKS = os.sysconf("SC_CLK_TCK")


class Window(NamedTuple):
    """What one stretch of time delivered."""

    images: int
    """Decoded sources, not views; or whatever else was counted."""
    seconds: float
    cpu_seconds: float
    """Of all threads of this process and of its worker processes, user and system."""


def abba(names: Sequence[T], repeats: int) -> list[T]:
    """Every name `repeats` times: forwards, backwards, forwards, ...

    A machine that slows down (heat, neighbours) then does not favour whoever comes first.
    """
    return [name for k in range(repeats) for name in (names if k % 2 == 0 else reversed(names))]


def window(batches: Iterator[int], *, seconds: float, device: torch.device) -> Window:
    """Take batches, given by their number of images, for about `seconds`, at least one.

    The device finishes what it was given, before the clock starts and before it stops.
    """
    finish(device)
    images, cpu, begin = 0, cpu_seconds(), time.perf_counter()
    for count in batches:
        images += count
        if time.perf_counter() - begin >= seconds:
            break
    finish(device)
    return Window(images, time.perf_counter() - begin, cpu_seconds() - cpu)


def finish(device: torch.device) -> None:
    """Wait for what a GPU was given; nothing on a CPU."""
    if device.type == "cuda":
        # Not at the top: processes that measure their memory need no torch.
        import torch

        torch.cuda.synchronize(device)


def cpu_seconds() -> float:
    """User and system time of this process, of its dead children, and of its living descendants.

    `RUSAGE_CHILDREN` counts children only once they have been waited for; those that live are read
    from /proc, whose clock ticks a hundred times a second.
    """
    dead = resource.getrusage(resource.RUSAGE_CHILDREN)
    alive = 0
    for process in descendants():
        fields = _stat(process)
        # utime, stime, and what its own dead children took.
        alive += sum(map(int, fields[11:15])) if fields else 0
    return time.process_time() + dead.ru_utime + dead.ru_stime + alive / _TICKS


def descendants() -> list[int]:
    """Process ids of the living children, their children, and so on."""
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
    """Memory of this process in MiB: `rss_mib` now, with its workers' (memory that several share
    is divided among them), and `peak_rss_mib` of this process alone."""
    own = _fields(Path("/proc/self/status"))
    shared = 0.0
    for process in (os.getpid(), *descendants()):
        try:
            shared += _fields(Path(f"/proc/{process}/smaps_rollup")).get("Pss", 0.0)
        except (FileNotFoundError, ProcessLookupError):
            continue  # It has ended in between.
    return {"rss_mib": round(shared / 1024, 1), "peak_rss_mib": round(own["VmHWM"] / 1024, 1)}


def _fields(path: Path) -> dict[str, float]:
    """The lines `Name:  123 kB` of a file in /proc."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): float(words[1]) for words in lines if words[-1] == "kB"}


def _stat(process: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty where the process has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()
