"""Engine: FFCV. Decodes a beton with FFCV's C library, pipeline, thread and ring of pinned buffers.

Of each JPEG only what its crop needs, where the beton has a side file of segments. Stock FFCV has
faults that a long run meets; `pipelines.engines.ffcv.loader` repairs those of its loader, and here:

- an exception in the loader's thread ends the thread and leaves the consumer waiting for ever:
  `DecodingThread.run` hands it over, `__next__` raises it and watches the clock;
- leaving an epoch early leaks a thread and all buffers: `DecodingThread.close` ends and joins it;
- every epoch starts a thread, which decodes nothing before: of a shuffled data set one thread runs
  on into the next epoch, whose first batches are ready when it begins.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipelines.batch import RawBatch, Regions
from pipelines.beton.reader import Beton
from pipelines.engines import samples as data_sets
from pipelines.engines.ffcv import kernels
from pipelines.engines.ffcv.loader import AHEAD, Decoded, RingLoader, Step, StockEpochIterator
from pipelines.engines.source import DecodeErrors
from pipelines.imaging.decode import ImageError
from pipelines.jpeg.splice import MISMATCH_REASON
from pipelines.sampling.order import Order
from pipelines.spec import LoaderSpec, Shard

_POLL_SECONDS = 0.2  # how soon a waiting side notices that the other one is gone


def _steps(order: Order, epoch: int, start: int) -> Iterator[Step]:
    """An epoch from a step on; where it is shuffled, as in training, all later epochs as well."""
    while True:
        indices, valid = order.batches(epoch, start)
        for row, step in enumerate(range(start, order.steps)):
            yield Step(epoch, step, indices[row], valid[row])
        if not order.spec.shuffle:
            return
        epoch, start = epoch + 1, 0


class DecodingThread(StockEpochIterator):  # type: ignore[misc]
    """FFCV's background thread, with errors handed over, a clock, an end, and no end of epochs."""

    def __init__(self, loader: RingLoader, steps: Iterator[Step], timeout: float) -> None:
        # Not stock's initialiser, which allocates a ring of buffers and opens CUDA streams.
        threading.Thread.__init__(self, name="ffcv-decoding", daemon=True)
        self._loader, self._steps, self._timeout = loader, steps, timeout
        self._failure: BaseException | None = None
        self._served = 0
        self._ready: queue.Queue[Decoded] = queue.Queue(AHEAD)
        self.terminate_event = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            for number, step in enumerate(self._steps):
                if not self._put(self._loader.decode(step, number)):
                    return
        except BaseException as error:  # handed to the consumer, which raises it
            self._failure = error

    def _put(self, item: Decoded) -> bool:
        """Queue an item unless the consumer has gone."""
        while not self.terminate_event.is_set():
            try:
                self._ready.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> Decoded:
        limit = self._timeout * (2 if self._served == 0 else 1)  # the first batch compiles
        deadline = time.monotonic() + limit
        while True:
            # Read before the queue: a thread that fails after this is seen on the next round.
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
                    self._timeout = _POLL_SECONDS  # it is stuck: closing waits no longer
                    raise TimeoutError(
                        f"no batch from FFCV's loader thread for {limit:.0f} s"
                    ) from None
        self._served += 1
        return item

    def close(self) -> None:
        """End the thread and wait for it; what it has prepared is discarded."""
        self.terminate_event.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=self._timeout)


class FfcvSource:
    """Decoded crops of a beton, by FFCV."""

    def __init__(self, beton: Beton, spec: LoaderSpec, *, shard: Shard, workers: int) -> None:
        self._beton, self._spec, self._most = beton, spec, workers
        self._order = Order(len(beton), spec, shard, beton.labels)
        self._loader = RingLoader(beton, spec, workers)
        self._running: DecodingThread | None = None
        self._ahead: tuple[int, int] | None = None
        self._end: weakref.finalize[..., Any] | None = None
        self.bad = DecodeErrors(spec.max_undecodable)

    def __len__(self) -> int:
        return self._order.steps

    @property
    def workers(self) -> int:
        """Decoding threads in use, 1 to the number given at construction; changes no pixel.

        A change takes effect with the next batch that is decoded.
        """
        return self._loader.tables.lanes

    @workers.setter
    def workers(self, number: int) -> None:
        if not 1 <= number <= self._most:
            raise ValueError(f"workers must be in 1..{self._most}, got {number}")
        self._loader.tables.lanes = number

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        """As `pipelines.engines.source.Source.epoch`."""
        if start_step == len(self):
            return
        running = self._thread(epoch, start_step)
        self.bad.start_epoch()
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
        """End the decoding thread and release the file."""
        self._stop()
        if self._running is None or not self._running.is_alive():  # Else stuck: wait no longer.
            self._loader.close()
        data_sets.close(self._beton)

    def _thread(self, epoch: int, start_step: int) -> DecodingThread:
        """The thread whose next batch is the one asked for: it runs already, or is started."""
        expected, self._ahead = self._ahead, None
        running = self._running
        if running is not None and running.is_alive() and expected == (epoch, start_step):
            return running
        # One thread at a time: the ring of buffers and the boxes in work belong to the loader.
        self._stop()
        if running is not None and running.is_alive():
            raise RuntimeError("FFCV's loader thread of an earlier epoch is stuck")
        steps = _steps(self._order, epoch, start_step)
        self._running = running = DecodingThread(self._loader, steps, self._spec.timeout)
        # A source that is dropped, and the end of the process, end the thread too.
        self._end = weakref.finalize(self, running.close)
        return running

    def _stop(self) -> None:
        if self._running is not None and self._end is not None:
            self._running.close()
            self._end.detach()

    def _finish(self, item: Decoded) -> RawBatch:
        step, ok = item.step, item.step.valid.copy()
        for i in np.flatnonzero(ok & (item.status != kernels.OK)):
            ok[i] = self._second_opinion(item, int(i))
        return RawBatch(
            item.images,
            torch.from_numpy(self._beton.labels[step.indices]),
            torch.from_numpy(step.indices),
            torch.from_numpy(ok),
            torch.from_numpy(item.boxes),
        )

    def _second_opinion(self, item: Decoded, i: int) -> bool:
        """Decode a refused sample with torchvision: FFCV's code also stands for mere warnings."""
        # Here, because torchvision takes seconds to import.
        from pipelines.imaging.torchvision_decode import crop, decode

        sample, box = int(item.step.indices[i]), item.boxes[i]
        try:
            if item.status[i] == kernels.DAMAGED:
                raise ImageError(MISMATCH_REASON)
            image = decode(self._beton.payload(sample))
        except ImageError as error:
            self.bad.report(data_sets.name(self._beton, sample), str(error))
            return False
        if isinstance(item.images, Regions):
            h, w = item.images.shapes[i].tolist()
            region = item.images.pixels[item.images.offsets[i] :][: h * w * 3]
            pixels = image.permute(1, 2, 0).contiguous()
            kernels.cut(
                pixels.data_ptr(), pixels.shape[0], pixels.shape[1], int(box[0]), int(box[1]),
                region.data_ptr(), h, w,
            )  # fmt: skip
        else:
            size = item.images.shape[1]
            item.images[i].copy_(crop(image, box, size).permute(1, 2, 0))
        return True
