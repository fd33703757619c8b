"""From an engine's borrowed tensors to the consumer's device, beside the training step.

On a GPU the copies run in a stream of their own: in the step's stream each would queue behind the
step before, and waiting for it, as reuse of the engine's buffers demands, would stop the host once
a step. What crosses the bus is uint8, one copy of each crop, into two buffers in turn. A consumer
that does not wait for its device asks for a batch as soon as the step before is launched, so the
copy runs beside that step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipelines.batch import RawBatch, Regions


class _Slot:
    """A buffer on the device, kept from batch to batch: nothing is allocated in a step."""

    def __init__(self, device: torch.device) -> None:
        event: Callable[..., Any] = torch.cuda.Event
        self.read: Any = event()
        """Comes in the consumer's stream behind the last use of the buffer."""
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def fill(self, source: torch.Tensor, reader: Any) -> torch.Tensor:
        """Copy uint8 of any shape into the buffer, in the current stream; `reader` will use it."""
        count = source.numel()
        if self._buffer.numel() < count:
            self._buffer = torch.empty(count, dtype=torch.uint8, device=self._buffer.device)
        # Allocated in one stream, used in the other: tell the allocator, or it reuses early.
        self._buffer.record_stream(reader)
        return self._buffer[:count].view(source.shape).copy_(source, non_blocking=True)


class Transfer:
    """The crops, labels, indices and validity of one batch after the other, on the device.

    For each batch: `wait`, `fetch`, `copy`, whatever reads the crops, `release`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            stream: Callable[..., Any] = torch.cuda.Stream
            event: Callable[..., Any] = torch.cuda.Event
            # Blocking: a host that runs ahead waits in every step, and would spin on a core that
            # decoding needs.
            self._stream, self._copied = stream(device), event(blocking=True)
            self._slots = [_Slot(device), _Slot(device)]
            self._numbers = torch.empty((0, 0), dtype=torch.int64)

    def wait(self) -> None:
        """Return when the last copy has read its buffers: the engine may reuse or free them.

        That copy has waited for the views of the batch two before it, so a host that runs ahead of
        its device is stopped here when it is about three steps ahead.
        """
        if self._stream is not None:
            self._copied.synchronize()

    def fetch(self, source: Iterator[RawBatch]) -> RawBatch | None:
        """The next item of an engine, or None at the end; `wait` has to come first.

        An engine that decodes on the GPU hands its crops over to the stream that is current here.
        """
        if self._stream is None:
            return next(source, None)
        with torch.cuda.stream(self._stream):
            return next(source, None)

    def copy(self, raw: RawBatch) -> RawBatch:
        """The tensors of a batch on the device; boxes stay where they are.

        Crops and regions are borrowed until `release`, the other tensors are owned. On a CPU they
        are not copied: the views that are made of them are new tensors anyway.
        """
        if self._stream is None:
            labels, indices, valid = raw.labels.clone(), raw.indices.clone(), raw.valid.clone()
            return raw._replace(labels=labels, indices=indices, valid=valid)
        current = torch.cuda.current_stream(self._device)
        slot = self._slots[0]
        columns = [raw.labels, raw.indices, raw.valid]
        if isinstance(raw.images, Regions):
            columns += [raw.images.offsets, *raw.images.shapes.T, raw.images.flips]
            pixels = _used(raw.images)
        else:
            pixels = raw.images
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.read)
            pixels = slot.fill(pixels, current)
            numbers = self._move(columns)
            numbers.record_stream(current)
            self._copied.record()
        current.wait_event(self._copied)
        images: torch.Tensor | Regions = pixels
        if isinstance(raw.images, Regions):
            shapes = numbers[4:6].T.int().contiguous()  # A cast keeps strides.
            images = Regions(pixels, numbers[3], shapes, numbers[6].bool(), raw.images.side)
        return RawBatch(images, numbers[0], numbers[1], numbers[2].bool(), raw.boxes)

    def release(self) -> None:
        """Let go of the crops: all that reads them is queued in the current stream."""
        if self._stream is not None:
            self._slots[0].read.record(torch.cuda.current_stream(self._device))
            self._slots.reverse()

    def _move(self, columns: list[torch.Tensor]) -> torch.Tensor:
        """Small tensors as one, int64 (len(columns), B), in one copy.

        From pinned memory: a copy from other memory may wait for those before it.
        """
        shape = (len(columns), len(columns[0]))
        if self._numbers.shape != shape:
            self._numbers = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        torch.stack([column.long() for column in columns], out=self._numbers)
        return self._numbers.to(self._device, non_blocking=True)


def _used(regions: Regions) -> torch.Tensor:
    """The front part of the pixels that regions lie in: buffers are made for the largest batch."""
    sizes = regions.shapes.long().prod(1) * 3
    return regions.pixels[: int((regions.offsets + sizes).max())]
