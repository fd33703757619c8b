"""Hardware ceilings: matrix product, memory copy, host-to-device transfer, per second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from harness.timing import synchronize
from pipelines.batch import DTYPES
from pipelines.spec import Precision

SECONDS = 0.5


def rate(work: Callable[[], object], amount: float, device: torch.device) -> float:
    """Return `amount` per second, measured over half a second. The first call is not counted.

    Args:
        work: Called repeatedly.
        amount: What one call processes, in any unit.
        device: Synchronized after every call.
    """
    work()
    synchronize(device)
    calls, begin = 0, time.perf_counter()
    while True:
        work()
        synchronize(device)
        calls += 1
        if (spent := time.perf_counter() - begin) >= SECONDS:
            return calls * amount / spent


def matmul_flops(device: torch.device, precision: Precision) -> float:
    """Return the floating point operations per second of a large matrix product.

    In fp32 on a GPU it uses the same rounding as convolutions (TF32 by default), because it is
    compared with them.
    """
    side = 8192 if device.type == "cuda" else 512
    a = torch.randn(side, side, device=device).to(DTYPES[precision])
    out = torch.empty_like(a)
    repeats = 10

    def work() -> None:
        for _ in range(repeats):
            torch.mm(a, a, out=out)

    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        return rate(work, repeats * 2.0 * side**3, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def copy_bytes(device: torch.device) -> float:
    """Return the bytes read and written per second by a copy within the device's memory."""
    size = 1 << (30 if device.type == "cuda" else 27)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return rate(lambda: target.copy_(source), 2.0 * size, device)


def bus_bytes(device: torch.device) -> float | None:
    """Return the bytes per second from pinned host memory to a GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    size = 1 << 28
    source = torch.ones(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return rate(lambda: target.copy_(source, non_blocking=True), float(size), device)
