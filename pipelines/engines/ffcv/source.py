"""Engine: FFCV. Decodes a beton with FFCV's C library, pipeline, thread and ring of pinned buffers.

If the beton has a side file, only the part of each JPEG that its crop needs is decoded. Stock FFCV
has faults that matter in long runs. `pipelines.engines.ffcv.loader` repairs those of its loader.
Repaired here:

- An exception ends the loader's thread and leaves the consumer waiting forever.
  `DecodingThread.run` stores it; `__next__` raises it, and has a timeout.
- Leaving an epoch early leaks a thread and all buffers. `DecodingThread.close` ends and joins it.
- Stock starts each epoch with a new thread and no batch ready. Here, if samples are shuffled, one
  thread continues into the next epoch, so its first batches are ready when it begins.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from pipelines.batch import RawBatch, Regions
from pipelines.beton.reader import Beton
from pipelines.engines.ffcv import kernels
from pipelines.engines.ffcv.loader import AHEAD, DecodedBatch, RingLoader, Step, StockEpochIterator
from pipelines.engines.source import DecodeErrorBudget
from pipelines.imaging.decode import ImageError
from pipelines.jpeg.splice import MISMATCH_REASON
from pipelines.sampling.order import Order
from pipelines.spec import LoaderSpec, Shard

_POLL_SECONDS = 0.2  # interval at which a waiting thread checks that the other one still runs


def _steps(order: Order, epoch: int, start: int) -> Iterator[Step]:
    """Yield the steps of an epoch from `start` on; if shuffled, those of all later epochs, too."""
    while True:
        indices, valid = order.batches(epoch, start)
        for row, step in enumerate(range(start, order.steps)):
            yield Step(epoch, step, indices[row], valid[row])
        if not order.spec.shuffle:
            return
        epoch, start = epoch + 1, 0


class DecodingThread(StockEpochIterator):  # type: ignore[misc]
    """FFCV's background thread. It passes on errors, times out, can be ended, and spans epochs."""

    def __init__(self, loader: RingLoader, steps: Iterator[Step], timeout: float) -> None:
        # Stock's initialiser is not called: it allocates a ring of buffers and CUDA streams.
        threading.Thread.__init__(self, name="ffcv-decoding", daemon=True)
        self._loader, self._steps, self._timeout = loader, steps, timeout
        self._failure: BaseException | None = None
        self._served = 0
        self._ready: queue.Queue[DecodedBatch] = queue.Queue(AHEAD)
        self.terminate_event = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            for number, step in enumerate(self._steps):
                if not self._put(self._loader.decode(step, number)):
                    return
        except BaseException as error:  # `__next__` raises it in the consumer
            self._failure = error

    def _put(self, item: DecodedBatch) -> bool:
        """Queue an item. Returns False if the consumer has left."""
        while not self.terminate_event.is_set():
            try:
                self._ready.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> DecodedBatch:
        limit = self._timeout * (2 if self._served == 0 else 1)  # the first batch may compile
        deadline = time.monotonic() + limit
        while True:
            # Before reading the queue: a thread that ends later is noticed in the next round.
            alive = self.is_alive()
            try:
                item = self._ready.get(timeout=_POLL_SECONDS if alive else 0)
                break
            except queue.Empty:
                if self._failure is not None:
                    raise self._failure from None
                if not alive:
                    raise RuntimeError("FFCV's loader thread ended without an error") from None
                if time.monotonic() > deadline:
                    self._timeout = _POLL_SECONDS  # it is stuck: `close` does not wait again
                    raise TimeoutError(
                        f"no batch from FFCV's loader thread for {limit:.0f} s"
                    ) from None
        self._served += 1
        return item

    def close(self) -> None:
        """End the thread and wait for it. Discards the batches it has decoded."""
        self.terminate_event.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=self._timeout)


class FfcvSource:
    """Crops of a beton, decoded by FFCV."""

    def __init__(self, beton: Beton, spec: LoaderSpec, *, shard: Shard, workers: int) -> None:
        self._beton, self._spec, self._max_workers = beton, spec, workers
        self._order = Order(len(beton), spec, shard, beton.labels)
        self._loader = RingLoader(beton, spec, workers)
        self._running: DecodingThread | None = None
        self._ahead: tuple[int, int] | None = None
        self._end: weakref.finalize[..., Any] | None = None
        self.decode_errors = DecodeErrorBudget(spec.max_undecodable)

    def __len__(self) -> int:
        return self._order.steps

    @property
    def workers(self) -> int:
        """Number of decoding threads in use. Changes no pixel.

        May be set to 1 up to the number given to the constructor. A change takes effect with the
        next batch that is decoded.
        """
        return self._loader.tables.lanes

    @workers.setter
    def workers(self, number: int) -> None:
        if not 1 <= number <= self._max_workers:
            raise ValueError(f"workers must be in 1..{self._max_workers}, got {number}")
        self._loader.tables.lanes = number

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[RawBatch, None, None]:
        """See `pipelines.engines.source.Source.epoch`."""
        if start_step == len(self):
            return
        running = self._thread(epoch, start_step)
        self.decode_errors.start_epoch()
        complete = False
        try:
            while not complete:
                item = next(running)
                yield self._finish(item)
                complete = item.step.step == len(self) - 1
        finally:
            if complete and self._spec.shuffle:
                self._ahead = (epoch + 1, 0)
            else:
                running.close()

    def close(self) -> None:
        """End the decoding thread and close the beton."""
        self._stop()
        # A thread that is still alive is stuck: do not wait for it.
        if self._running is None or not self._running.is_alive():
            self._loader.close()
        self._beton.close()

    def _thread(self, epoch: int, start_step: int) -> DecodingThread:
        """Return a thread whose next batch is the requested one: the running one, or a new one."""
        expected, self._ahead = self._ahead, None
        running = self._running
        if running is not None and running.is_alive() and expected == (epoch, start_step):
            return running
        # One thread at a time: all threads would share the ring and the tables of the loader.
        self._stop()
        if running is not None and running.is_alive():
            raise RuntimeError("FFCV's loader thread of an earlier epoch is stuck")
        steps = _steps(self._order, epoch, start_step)
        self._running = running = DecodingThread(self._loader, steps, self._spec.timeout)
        # Also ends the thread when the source is collected, and at exit.
        self._end = weakref.finalize(self, running.close)
        return running

    def _stop(self) -> None:
        if self._running is not None and self._end is not None:
            self._running.close()
            self._end.detach()

    def _finish(self, item: DecodedBatch) -> RawBatch:
        step, ok = item.step, item.step.valid.copy()
        for i in np.flatnonzero(ok & (item.status != kernels.OK)):
            ok[i] = self._decode_with_torchvision(item, int(i))
        labels = self._beton.labels[step.indices]
        return RawBatch.from_arrays(item.images, labels, step.indices, ok, item.boxes)

    def _decode_with_torchvision(self, item: DecodedBatch, i: int) -> bool:
        """Decode a rejected sample with torchvision. Returns whether it could be decoded.

        FFCV's decoder also rejects images for which libjpeg only warns.
        """
        # Imported here because torchvision takes seconds to import.
        from pipelines.imaging.torchvision_decode import crop, decode

        sample, box = int(item.step.indices[i]), item.boxes[i]
        try:
            if item.status[i] == kernels.DAMAGED:
                raise ImageError(MISMATCH_REASON)
            image = decode(self._beton.payload(sample))
        except ImageError as error:
            self.decode_errors.report(self._beton.location(sample), str(error))
            return False
        if isinstance(item.images, Regions):
            h, w = item.images.shapes[i].tolist()
            region = item.images.pixels[item.images.offsets[i] :][: h * w * 3]
            pixels = image.permute(1, 2, 0).contiguous()
            kernels.copy_box(
                pixels.data_ptr(), pixels.shape[0], pixels.shape[1], int(box[0]), int(box[1]),
                region.data_ptr(), h, w,
            )  # fmt: skip
        else:
            size = item.images.shape[1]
            item.images[i].copy_(crop(image, box, size).permute(1, 2, 0))
        return True
