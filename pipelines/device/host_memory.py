"""Memory pool for batches on the CPU: memory is reused once the consumer has dropped the batch.

A fresh batch of views is tens of megabytes, which the system maps page by page at the first write.
That costs several times the work of filling them. Consumers own their batches: memory is reused
only when nothing refers to it any more.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch

from pipelines.arrays import Uint8

_MAX_FREE = 3  # A trainer holds one batch while the next is made.


class BufferPool:
    """Pool of channels_last tensors on the CPU. Every loader has its own."""

    def __init__(self) -> None:
        self._free: list[Uint8] = []

    def images(self, rows: int, side: int, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor (rows, 3, side, side), channels_last.

        Its memory returns to the pool when the tensor and all its views are gone.

        Args:
            rows: Number of images.
            side: Height and width.
            dtype: A floating point type.
        """
        size = rows * side * side * 3 * dtype.itemsize
        memory = self._take(size)
        # A fresh view per tensor: torch keeps it alive as long as the storage, so its finalizer
        # tells when the memory is free again.
        lent = memory[:]
        weakref.finalize(lent, self._give_back, memory).atexit = False
        flat = torch.from_numpy(lent).view(dtype)
        return flat.view(rows, side, side, 3).permute(0, 3, 1, 2)

    def _take(self, size: int) -> Uint8:
        while self._free:
            memory = self._free.pop()
            if len(memory) == size:
                return memory  # Others have the size of an earlier resolution or batch: dropped.
        return np.empty(size, np.uint8)

    def _give_back(self, memory: Uint8) -> None:
        if len(self._free) < _MAX_FREE:
            self._free.append(memory)
