"""Forward and backward as CUDA graphs, one per input shape, and gradients that never move.

A graph starts all kernels of a forward and backward pass with one call. It helps where the host is
late: decoding threads on most cores, a small network, a small batch. Where the GPU is never idle it
brings nothing, and at pretraining batches of a ResNet-50 that is the usual case.

The optimiser stays outside: fused, it is a few launches, its learning rate changes at every step,
and a gradient scaler may skip it. Between processes the gradients are averaged after the backward
pass, outside the graph as well: no collective is ever captured, at the price that sending does not
overlap with computing (a ResNet-50 sends 100 MB).

No GPU has run this module yet. What is tested without one is the bookkeeping, through a stand-in
for `CudaCapture`; `tests/gpu/test_training.py` compares weights where there is a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from rotpred.distributed import Rank

logger = logging.getLogger(__name__)

T = TypeVar("T")

WARM_UP = 3
"""Steps of each shape before its capture: they compile, tune convolutions and make constants."""

_ALIGN = 64  # elements: a fused optimiser loads four at a time from each tensor's beginning


class Capture(Protocol):
    """What `Graphs` needs of a device."""

    def eager(self, work: Callable[[], T]) -> T:
        """Do the work now, in a way that prepares its capture."""

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        """Capture the work without doing it; each call of the result does it.

        It reads and writes the same memory each time: its result is overwritten by the next call.
        """


class CudaCapture:
    """CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Shared: one graph's results are used up before another one is replayed.
        self._pool = torch.cuda.graph_pool_handle()

    def eager(self, work: Callable[[], T]) -> T:
        """Do the work on the stream of the capture, as torch's notes on CUDA graphs ask for."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        """Capture; waits for the device, once per shape."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's threads go on pinning memory and recording events meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            result = work()

        def replay() -> T:
            graph.replay()
            return result

        return replay


@dataclass
class _Bucket(Generic[T]):
    """The graph of one shape, and the memory it reads."""

    inputs: tuple[torch.Tensor, ...]
    warmed: int = 0
    replay: Callable[[], T] | None = None


class Graphs(Generic[T]):
    """Runs a function of tensors, from its fourth call with the same shapes on as a graph."""

    def __init__(self, capture: Capture, work: Callable[..., T]) -> None:
        """Nothing is captured yet.

        Args:
            capture: the device.
            work: called with copies of the inputs that lie at fixed addresses; must not read the
                device back, and must neither make nor free what outlives it, gradients included.
        """
        self._capture, self._work = capture, work
        self._buckets: dict[Hashable, _Bucket[T]] = {}

    def __call__(self, *inputs: torch.Tensor) -> T:
        """Do the work, on whatever the inputs hold. The result is borrowed until the next call."""
        key = tuple((tensor.shape, tensor.dtype, tensor.stride()) for tensor in inputs)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = _Bucket(tuple(torch.empty_like(tensor) for tensor in inputs))
            self._buckets[key] = bucket
        for static, given in zip(bucket.inputs, inputs, strict=True):
            static.copy_(given)
        if bucket.replay is not None:
            return bucket.replay()

        def work() -> T:
            return self._work(*bucket.inputs)

        if bucket.warmed < WARM_UP:
            # A real step: unlike a rehearsal it leaves no mark on statistics or random numbers.
            bucket.warmed += 1
            return self._capture.eager(work)
        bucket.replay = self._capture.record(work)
        logger.info("CUDA graph number %d: inputs of %s", len(self._buckets), tuple(key[0][0]))
        return bucket.replay()


class FlatGradients:
    """The gradients of all weights as parts of one tensor per type.

    They lie where a graph expects them, are set to zero by one call, and are averaged between
    processes by one message.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every weight that is trained a gradient of zeros."""
        trained = [p for p in parameters if p.requires_grad]
        self._flat: list[torch.Tensor] = []
        for dtype in dict.fromkeys(p.dtype for p in trained):
            alike = [p for p in trained if p.dtype == dtype]
            sizes = [-(-p.numel() // _ALIGN) * _ALIGN for p in alike]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=alike[0].device)
            for p, part in zip(alike, torch.split(flat, sizes), strict=True):
                # Laid out as the weight itself, which may be channels_last.
                p.grad = part.as_strided(p.size(), p.stride())
            self._flat.append(flat)

    def zero(self) -> None:
        """After an update."""
        for flat in self._flat:
            flat.zero_()

    def average(self, rank: Rank) -> None:
        """Over all ranks, as `DistributedDataParallel` does: divided first, then summed."""
        if rank.world == 1:
            return
        for flat in self._flat:
            dist.all_reduce(flat.div_(rank.world))
