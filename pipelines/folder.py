"""Engine: torchvision's decoder and antialiased resize, in threads. Reads every data set.

Threads, not processes: decoding and resizing release the interpreter lock, batches need no copy
between processes, an exception arrives where it belongs, and an abandoned epoch leaves nothing
behind. The other engines are compared with this one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
import torch

from pipelines import samples as data_sets
from pipelines.augment import Int32, boxes
from pipelines.batch import RawBatch
from pipelines.beton import Beton
from pipelines.decode import ImageError
from pipelines.faults import BadSamples
from pipelines.order import Int64, Order
from pipelines.picture import crop, decode
from pipelines.samples import RAW, Samples
from pipelines.spec import LoaderSpec, Shard

_AHEAD = 3  # batches in work: enough to cover one slow picture, small enough for memory
_CHUNK = 16  # samples per task: boxes are drawn for a chunk at once


class _Buffers(NamedTuple):
    images: torch.Tensor
    boxes: Int32
    bad: dict[int, str]


class FolderSource:
    """Decoded crops of a folder, list or beton, by torchvision on the CPU."""

    def __init__(
        self, samples: Samples, spec: LoaderSpec, *, shard: Shard, workers: int, pin: bool
    ) -> None:
        self._samples, self._spec, self._pin = samples, spec, pin
        self._order = Order(len(samples), spec, shard)
        self.bad = BadSamples(spec.max_bad)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def __len__(self) -> int:
        return self._order.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        """As `pipelines.loader.Source.epoch`."""
        indices, valid = self._order.batches(epoch, start_step)
        self.bad.start_epoch()
        work: deque[tuple[int, _Buffers, list[Future[None]]]] = deque()
        # The abandoned futures of an epoch that is left early must not go on decoding.
        stop = threading.Event()
        try:
            step = 0
            while step < len(indices) or work:
                while step < len(indices) and len(work) < _AHEAD:
                    work.append((step, *self._submit(epoch, indices[step], stop)))
                    step += 1
                done, buffers, futures = work.popleft()
                self._wait(futures)
                ok = valid[done].copy()
                for i, reason in buffers.bad.items():
                    if ok[i]:
                        name = data_sets.name(self._samples, int(indices[done, i]))
                        self.bad.report(name, reason)
                    ok[i] = False
                yield RawBatch(
                    buffers.images,
                    torch.from_numpy(self._samples.labels[indices[done]]),
                    torch.from_numpy(indices[done]),
                    torch.from_numpy(ok),
                    torch.from_numpy(buffers.boxes),
                )
        finally:
            stop.set()

    def close(self) -> None:
        """End the decoding threads and release the file."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        data_sets.close(self._samples)

    def _wait(self, futures: list[Future[None]]) -> None:
        """Until all have ended, raising what a thread raised."""
        limit = self._spec.timeout
        late = wait(futures, timeout=limit, return_when=FIRST_EXCEPTION).not_done
        for future in futures:
            if future.done():
                future.result()
        if late:
            raise TimeoutError(f"no batch from the decoding threads for {limit:.0f} s")

    def _submit(
        self, epoch: int, indices: Int64, stop: threading.Event
    ) -> tuple[_Buffers, list[Future[None]]]:
        side = self._spec.side(epoch)
        images = torch.empty((len(indices), side, side, 3), dtype=torch.uint8, pin_memory=self._pin)
        buffers = _Buffers(images, np.zeros((len(indices), 5), np.int32), {})
        chunks = [slice(i, i + _CHUNK) for i in range(0, len(indices), _CHUNK)]
        return buffers, [
            self._pool.submit(self._decode, epoch, indices[c], c.start, buffers, stop)
            for c in chunks
        ]

    def _decode(
        self, epoch: int, indices: Int64, start: int, buffers: _Buffers, stop: threading.Event
    ) -> None:
        pictures: list[torch.Tensor] = []
        for i, sample in enumerate(indices):
            if stop.is_set():
                return
            try:
                pictures.append(self._picture(int(sample)))
            except ImageError as error:
                buffers.bad[start + i] = str(error)
                # Any size that a crop fits into: the pixels are blanked below.
                side = self._spec.crop.size
                pictures.append(torch.zeros((3, side, side), dtype=torch.uint8))
        rows = slice(start, start + len(indices))
        buffers.boxes[rows] = boxes(
            self._spec,
            epoch=epoch,
            indices=indices,
            heights=np.array([p.shape[1] for p in pictures], np.int32),
            widths=np.array([p.shape[2] for p in pictures], np.int32),
        )
        for row, picture in enumerate(pictures, start):
            square = crop(picture, buffers.boxes[row], buffers.images.shape[1])
            # numpy's copy: torch's would start a team of threads for each of ours.
            np.copyto(buffers.images[row].numpy(), square.permute(1, 2, 0).numpy())

    def _picture(self, i: int) -> torch.Tensor:
        samples = self._samples
        payload = data_sets.encoded(samples, i)
        if isinstance(samples, Beton) and samples.modes[i] == RAW:
            shape = (int(samples.heights[i]), int(samples.widths[i]), 3)
            pixels = np.asarray(payload).reshape(shape)
            return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        return decode(payload)
