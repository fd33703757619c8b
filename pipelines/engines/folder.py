"""Engine: torchvision's decoder and antialiased resize, in threads. Reads every data set.

It uses threads, not worker processes: decoding and resizing release the GIL, batches are not copied
between processes, exceptions reach the consumer, and an abandoned epoch leaves nothing behind. It
is the reference for the other engines.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
import torch

from pipelines.arrays import Bool, Int32, Int64
from pipelines.batch import RawBatch
from pipelines.engines.source import DecodeErrorBudget
from pipelines.imaging.decode import ImageError
from pipelines.imaging.torchvision_decode import crop, decode
from pipelines.samples import Samples
from pipelines.sampling.crops import crop_boxes
from pipelines.sampling.order import Order
from pipelines.spec import LoaderSpec, Shard

_AHEAD = 3  # batches decoded ahead: enough to hide one slow image, few enough for memory
_CHUNK = 16  # samples per task: crop boxes are drawn for a chunk at once


class _PendingBatch(NamedTuple):
    """A batch submitted to the threads."""

    indices: Int64
    valid: Bool
    images: torch.Tensor
    boxes: Int32
    errors: dict[int, str]
    """Undecodable rows, each with the reason."""
    futures: list[Future[None]]


class _Run:
    """Batches submitted to the threads, in order, from one step on."""

    def __init__(self, batches: Iterator[_PendingBatch], stop: threading.Event) -> None:
        self._batches, self._stop = batches, stop
        self._pending: deque[_PendingBatch] = deque()

    def next(self) -> _PendingBatch:
        """Return the next batch, which may be unfinished. Submits more batches."""
        self._pending.extend(itertools.islice(self._batches, _AHEAD + 1 - len(self._pending)))
        return self._pending.popleft()

    def stop(self) -> None:
        """Tell the threads to skip the submitted batches."""
        self._stop.set()


class FolderSource:
    """Crops of any data set, decoded by torchvision on the CPU."""

    def __init__(
        self, samples: Samples, spec: LoaderSpec, *, shard: Shard, workers: int, pin: bool
    ) -> None:
        self._samples, self._spec, self._pin = samples, spec, pin
        self._order = Order(len(samples), spec, shard, samples.labels)
        self.decode_errors = DecodeErrorBudget(spec.max_undecodable)
        self._pool = _pool(workers)
        self._workers = workers
        self._kept: tuple[int, _Run] | None = None

    def __len__(self) -> int:
        return self._order.steps

    @property
    def workers(self) -> int:
        """Number of decoding threads. May be set while no epoch runs."""
        return self._workers

    @workers.setter
    def workers(self, count: int) -> None:
        self._keep(None)
        self._pool.shutdown(wait=True)
        self._pool, self._workers = _pool(count), count

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[RawBatch, None, None]:
        """See `pipelines.engines.source.Source.epoch`.

        If samples are shuffled, as in training, decoding of the next epoch starts before this one
        ends.
        """
        run = self._resume(epoch, start_step)
        self.decode_errors.start_epoch()
        left = self._order.steps - start_step
        try:
            while left:
                raw = self._finish(run.next())
                left -= 1
                yield raw
        finally:
            if left or not self._spec.shuffle:
                run.stop()
            else:
                self._keep((epoch + 1, run))

    def close(self) -> None:
        """End the decoding threads and close the data set."""
        self._keep(None)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._samples.close()

    def _resume(self, epoch: int, start_step: int) -> _Run:
        """Return the run that has already reached this step, or a new one."""
        if self._kept is not None and self._kept[0] == epoch and start_step == 0:
            run, self._kept = self._kept[1], None
            return run
        stop = threading.Event()
        first = self._order.batches(epoch, start_step)
        return _Run(self._batches(epoch, first, stop), stop)

    def _keep(self, kept: tuple[int, _Run] | None) -> None:
        """Keep a run that has reached the start of an epoch, and stop the one kept before."""
        if self._kept is not None:
            self._kept[1].stop()
        self._kept = kept

    def _batches(
        self, epoch: int, first: tuple[Int64, Bool], stop: threading.Event
    ) -> Iterator[_PendingBatch]:
        """Submit batches one by one; if shuffled, without end, epoch after epoch."""
        for indices, valid in zip(*first, strict=True):
            yield self._submit(epoch, indices, valid, stop)
        while self._spec.shuffle:
            epoch += 1
            for indices, valid in zip(*self._order.batches(epoch), strict=True):
                yield self._submit(epoch, indices, valid, stop)

    def _finish(self, work: _PendingBatch) -> RawBatch:
        """Wait for a batch, and report its undecodable samples."""
        limit = self._spec.timeout
        late = wait(work.futures, timeout=limit, return_when=FIRST_EXCEPTION).not_done
        for future in work.futures:
            if future.done():
                future.result()
        if late:
            raise TimeoutError(f"no batch from the decoding threads for {limit:.0f} s")
        ok = work.valid.copy()
        for i, reason in work.errors.items():
            if ok[i]:
                self.decode_errors.report(self._samples.location(int(work.indices[i])), reason)
            ok[i] = False
        labels = self._samples.labels[work.indices]
        return RawBatch.from_arrays(work.images, labels, work.indices, ok, work.boxes)

    def _submit(
        self, epoch: int, indices: Int64, valid: Bool, stop: threading.Event
    ) -> _PendingBatch:
        side = self._spec.side(epoch)
        images = torch.empty((len(indices), side, side, 3), dtype=torch.uint8, pin_memory=self._pin)
        work = _PendingBatch(indices, valid, images, np.zeros((len(indices), 5), np.int32), {}, [])
        work.futures.extend(
            self._pool.submit(self._decode, epoch, slice(i, i + _CHUNK), work, stop)
            for i in range(0, len(indices), _CHUNK)
        )
        return work

    def _decode(self, epoch: int, rows: slice, work: _PendingBatch, stop: threading.Event) -> None:
        indices = work.indices[rows]
        images: list[torch.Tensor] = []
        for i, sample in enumerate(indices):
            if stop.is_set():
                return
            try:
                images.append(self._image(int(sample)))
            except ImageError as error:
                work.errors[rows.start + i] = str(error)
                # Any size that a crop fits into: the crop is black.
                side = self._spec.crop.size
                images.append(torch.zeros((3, side, side), dtype=torch.uint8))
        work.boxes[rows] = crop_boxes(
            self._spec,
            epoch=epoch,
            indices=indices,
            heights=np.array([p.shape[1] for p in images], np.int32),
            widths=np.array([p.shape[2] for p in images], np.int32),
        )
        for row, image in enumerate(images, rows.start):
            square = crop(image, work.boxes[row], work.images.shape[1])
            # numpy's copy: torch's would start its own threads for each of ours.
            np.copyto(work.images[row].numpy(), square.permute(1, 2, 0).numpy())

    def _image(self, i: int) -> torch.Tensor:
        image = self._samples.read(i)
        if isinstance(image, bytes) or image.ndim == 1:
            return decode(image)
        return torch.from_numpy(image.copy()).permute(2, 0, 1)


def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="decode")
