"""Memory for batches on a CPU, used again once their consumer has dropped them.

A fresh batch of views is tens of megabytes that the system maps page by page at the first write:
several times the work of filling them. Batches stay owned by whoever holds them; only what nobody
holds any more is written again.
"""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt
import torch

_KEPT = 3  # a trainer holds one batch while the next is made


class BufferPool:
    """Hands out channels_last tensors on the CPU. One per loader."""

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.uint8]] = []

    def images(self, rows: int, side: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised (rows, 3, side, side), channels_last, of a floating point type.

        Its memory comes back, and may be handed out again, when the tensor and all its views are
        gone.
        """
        size = rows * side * side * 3 * dtype.itemsize
        memory = self._take(size)
        # A view of its own for each loan: torch holds it as long as the storage lives, and its end
        # is the loan's end.
        loan = memory[:]
        weakref.finalize(loan, self._give, memory).atexit = False
        flat = torch.from_numpy(loan).view(dtype)
        return flat.view(rows, side, side, 3).permute(0, 3, 1, 2)

    def _take(self, size: int) -> npt.NDArray[np.uint8]:
        while self._free:
            memory = self._free.pop()
            if len(memory) == size:
                return memory  # others belong to a side or batch that has passed
        return np.empty(size, np.uint8)

    def _give(self, memory: npt.NDArray[np.uint8]) -> None:
        if len(self._free) < _KEPT:
            self._free.append(memory)
