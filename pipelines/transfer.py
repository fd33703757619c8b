"""From an engine's borrowed tensors to the consumer's device, beside the training step.

On a GPU the copy runs in a stream of its own: in the step's stream it would queue behind the step
before, and waiting for it, as reuse of the engine's buffers demands, would stop the host once a
step. What crosses the bus is uint8, one copy of each crop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipelines.batch import RawBatch


class Transfer:
    """Owned copies of the crops, labels, indices and validity of one batch after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._copied: Any = None
        if device.type == "cuda":
            stream: Callable[..., Any] = torch.cuda.Stream
            event: Callable[..., Any] = torch.cuda.Event
            self._stream, self._copied = stream(device), event()

    def fetch(self, source: Iterator[RawBatch]) -> RawBatch | None:
        """The next item of an engine, or None at the end.

        Waits first until the last copy has read the buffers, which the engine may now reuse. An
        engine that decodes on the GPU hands its crops over to the stream that is current here.
        """
        if self._stream is None:
            return next(source, None)
        self._copied.synchronize()
        with torch.cuda.stream(self._stream):
            return next(source, None)

    def copy(self, raw: RawBatch) -> RawBatch:
        """The tensors of a batch on the device; boxes stay where they are.

        On a CPU the crops are not copied: the views that are made of them are new tensors anyway.
        """
        if self._stream is None:
            labels, indices, valid = raw.labels.clone(), raw.indices.clone(), raw.valid.clone()
            return raw._replace(labels=labels, indices=indices, valid=valid)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            # copy=True: crops that an engine decoded on the GPU are borrowed as well.
            moved = [
                tensor.to(self._device, non_blocking=True, copy=True)
                for tensor in (raw.images, raw.labels, raw.indices, raw.valid)
            ]
            self._copied.record()
        current.wait_stream(self._stream)
        for tensor in moved:
            # Allocated in one stream, used in the other: tell the allocator, or it reuses early.
            tensor.record_stream(current)
        return RawBatch(moved[0], moved[1], moved[2], moved[3], raw.boxes)
