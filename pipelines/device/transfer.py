"""Copy of an engine's borrowed tensors to the consumer's device, concurrent with training.

On a GPU the copies run on their own stream. On the training stream each copy would queue after the
previous step; the host must wait for the copy before the engine reuses its buffers, and would then
stall in every step. Each crop crosses the bus once, as uint8, into one of two alternating buffers.
A consumer that does not wait for its device asks for a batch as soon as the previous step is
launched, so the copy overlaps with that step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from pipelines.batch import RawBatch, Regions


class _Buffer:
    """A device buffer that is reused for every batch, so that steps allocate nothing."""

    def __init__(self, device: torch.device) -> None:
        self.read: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        """Event recorded on the consumer's stream after the buffer's last use."""
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def fill(self, source: torch.Tensor, reader: Any) -> torch.Tensor:
        """Copy uint8 of any shape into the buffer on the current stream, for use by `reader`."""
        count = source.numel()
        if self._buffer.numel() < count:
            self._buffer = torch.empty(count, dtype=torch.uint8, device=self._buffer.device)
        # Allocated on one stream, used on another: else the allocator would reuse it too early.
        self._buffer.record_stream(reader)
        return self._buffer[:count].view(source.shape).copy_(source, non_blocking=True)


class Transfer:
    """Moves batches to the device: crops, labels, indices and validity.

    Call order per batch: `wait`, `fetch`, `copy`, then whatever reads the crops, `release`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # Blocking: a host that runs ahead waits in every step. Spinning would take a core from
            # decoding.
            self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._buffers = [_Buffer(device), _Buffer(device)]
            self._pinned = torch.empty((0, 0), dtype=torch.int64)

    def wait(self) -> None:
        """Wait until the last copy is done and the engine may reuse or free its tensors.

        That copy waits for the views of the batch two before it. A host that runs ahead of its
        device therefore blocks here when it is about three steps ahead.
        """
        if self._stream is not None:
            self._copied.synchronize()

    def fetch(self, source: Iterator[RawBatch]) -> RawBatch | None:
        """Return an engine's next batch, or None at the end. Call `wait` first.

        An engine that decodes on the GPU makes its crops available to the stream current here.
        """
        if self._stream is None:
            return next(source, None)
        with torch.cuda.stream(self._stream):
            return next(source, None)

    def copy(self, raw: RawBatch) -> RawBatch:
        """Return a batch with its tensors on the device; `boxes` stay where they are.

        Crops and regions are borrowed until `release`, the other tensors are owned. On a CPU crops
        are not copied, because the views made from them are new tensors anyway.

        Args:
            raw: uint8 crops (B, S, S, 3) or regions, with labels, indices and validity (B,).
        """
        if self._stream is None:
            labels, indices, valid = raw.labels.clone(), raw.indices.clone(), raw.valid.clone()
            return raw._replace(labels=labels, indices=indices, valid=valid)
        current = torch.cuda.current_stream(self._device)
        buffer = self._buffers[0]
        columns = [raw.labels, raw.indices, raw.valid]
        if isinstance(raw.images, Regions):
            columns += [raw.images.offsets, *raw.images.shapes.T, raw.images.flips]
            pixels = _used_pixels(raw.images)
        else:
            pixels = raw.images
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(buffer.read)
            pixels = buffer.fill(pixels, current)
            numbers = self._move(columns)
            numbers.record_stream(current)
            self._copied.record()
        current.wait_event(self._copied)
        images: torch.Tensor | Regions = pixels
        if isinstance(raw.images, Regions):
            shapes = numbers[4:6].T.int().contiguous()  # A cast alone would keep the strides.
            images = Regions(pixels, numbers[3], shapes, numbers[6].bool(), raw.images.side)
        return RawBatch(images, numbers[0], numbers[1], numbers[2].bool(), raw.boxes)

    def release(self) -> None:
        """Free the crops once all work queued on the current stream has read them."""
        if self._stream is not None:
            self._buffers[0].read.record(torch.cuda.current_stream(self._device))
            self._buffers.reverse()

    def _move(self, columns: list[torch.Tensor]) -> torch.Tensor:
        """Copy small tensors (B,) together, as int64 (len(columns), B).

        The copy is from pinned memory: one from pageable memory may wait for those before it.
        """
        shape = (len(columns), len(columns[0]))
        if self._pinned.shape != shape:
            self._pinned = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        torch.stack([column.long() for column in columns], out=self._pinned)
        return self._pinned.to(self._device, non_blocking=True)


def _used_pixels(regions: Regions) -> torch.Tensor:
    """Drop pixels after the last region: the engine's buffers are sized for the largest batch."""
    sizes = regions.shapes.long().prod(1) * 3
    return regions.pixels[: int((regions.offsets + sizes).max())]
