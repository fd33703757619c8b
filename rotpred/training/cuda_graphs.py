"""Forward and backward as CUDA graphs, one per input shape; gradients at fixed addresses.

A graph launches all kernels of a forward and backward pass with one call. This helps if the host
launches kernels too slowly: decoding threads on most cores, a small network, a small batch. It does
not help if the GPU is never idle, the usual case for ResNet-50 at pretraining batch sizes.

The optimiser stays outside of the graph: fused, it is a few launches, its learning rate changes at
every step, and a gradient scaler may skip it. Gradients are averaged between processes after the
backward pass, also outside: no collective is captured. The price is that communication does not
overlap with computation (a ResNet-50 sends 100 MB).

No GPU has run this module yet. Tests without a GPU replace `CudaCapture` by a fake and check the
bookkeeping; `tests/gpu/test_training.py` compares weights on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from rotpred.distributed import Rank

logger = logging.getLogger(__name__)

T = TypeVar("T")

WARM_UP = 3
"""Eager steps per shape before its capture. They compile, tune convolutions, create constants."""

_ALIGN = 64  # elements: a fused optimiser loads four at a time from each tensor's start


class CudaCapture:
    """Captures CUDA graphs that share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        """Create the stream and the pool; raise `ValueError` on a CPU."""
        if device.type != "cuda":
            raise ValueError("run.cuda_graph needs a GPU: on a CPU pass --run.no-cuda-graph")
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Shared: one graph's results are consumed before another one is replayed.
        self._pool = torch.cuda.graph_pool_handle()

    def eager(self, work: Callable[[], T]) -> T:
        """Run the work on the capture stream, as torch's notes on CUDA graphs require."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        """Capture the work without running it; return a function that runs it.

        Every call of that reads and writes the same memory and overwrites the previous result. The
        capture waits for the device, once per shape.
        """
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's threads pin memory and record events during the capture.
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
    """The graph of one input shape, and its static inputs."""

    inputs: tuple[torch.Tensor, ...]
    warm_up_steps: int = 0
    replay: Callable[[], T] | None = None


class Graphs(Generic[T]):
    """Runs a function of tensors; from the fourth call with the same shapes, as a CUDA graph."""

    def __init__(self, capture: CudaCapture, work: Callable[..., T]) -> None:
        """Store the function; nothing is captured yet.

        Args:
            capture: Captures on the device.
            work: Called with copies of the inputs at fixed addresses. It must not read from the
                device, and must neither allocate nor free memory that outlives it, gradients
                included.
        """
        self._capture, self._work = capture, work
        self._buckets: dict[Hashable, _Bucket[T]] = {}

    def __call__(self, *inputs: torch.Tensor) -> T:
        """Run the work on tensors of any shape. The next call overwrites the result."""
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

        if bucket.warm_up_steps < WARM_UP:
            # A real step: a dry run would change batch norm statistics and random states.
            bucket.warm_up_steps += 1
            return self._capture.eager(work)
        bucket.replay = self._capture.record(work)
        logger.info("CUDA graph number %d: inputs of %s", len(self._buckets), tuple(key[0][0]))
        return bucket.replay()


class FlatGradients:
    """The gradients of all weights as views into one flat tensor per dtype.

    Their addresses are fixed, as a graph needs. One call per dtype zeroes them, one all-reduce per
    dtype averages them between processes.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every trainable weight a gradient of zeros."""
        trained = [p for p in parameters if p.requires_grad]
        self._flat: list[torch.Tensor] = []
        for dtype in dict.fromkeys(p.dtype for p in trained):
            alike = [p for p in trained if p.dtype == dtype]
            sizes = [-(-p.numel() // _ALIGN) * _ALIGN for p in alike]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=alike[0].device)
            for p, part in zip(alike, torch.split(flat, sizes), strict=True):
                # Strides of the weight itself, which may be channels_last.
                p.grad = part.as_strided(p.size(), p.stride())
            self._flat.append(flat)

    def zero(self) -> None:
        """Set all gradients to zero. Call it after an update."""
        for flat in self._flat:
            flat.zero_()

    def average(self, rank: Rank) -> None:
        """Average over all ranks as `DistributedDataParallel` does: divide first, then sum."""
        if rank.world == 1:
            return
        for flat in self._flat:
            dist.all_reduce(flat.div_(rank.world))
