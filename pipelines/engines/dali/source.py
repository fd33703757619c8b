"""Engine: NVIDIA DALI. Decodes only the region of the crop on the CPU, or images with nvJPEG.

If the beton has a side file, the decoder receives only the segments under the crop, as a small
JPEG. So nvJPEG and the GPU's JPEG engine, which decode whole images, decode regions, too.

Order and crop boxes are ours: `fn.external_source` feeds encoded bytes, so DALI's own epochs,
padding and seeds, which differ between ranks and policies, are not used. The feed continues from
epoch to epoch, and every batch carries its (epoch, step). A consumer that left early, or resumes
elsewhere, discards the prefetched batches. DALI cannot continue after an image that it cannot
decode: the run ends with an error that names the sample.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from pipelines.arrays import Bool, Int64, Uint8
from pipelines.batch import RawBatch
from pipelines.beton.splicing import splice_batch
from pipelines.engines.dali.graph import IN_FLIGHT, PREFETCH, STUCK_SECONDS, Crops, Graph
from pipelines.engines.source import DecodeErrorBudget
from pipelines.imaging.decode import ImageError
from pipelines.imaging.torchvision_decode import decode
from pipelines.jpeg.markers import read_header
from pipelines.native.threads import DaemonWorker
from pipelines.samples import Samples
from pipelines.sampling.crops import crop_boxes
from pipelines.sampling.order import Order
from pipelines.spec import LoaderSpec, Shard

Batches = Callable[[int, int], tuple[Int64, Bool]]
"""Type of `Order.batches`."""

_FEED_AHEAD = 1  # batches ready in the feed, beyond those that DALI has taken


class _Feed:
    """Endless input batches for `fn.external_source`; `move` jumps to any step.

    DALI requests inputs within `run`. A background thread prepares them in advance: it reads the
    files and computes the crop boxes.
    """

    def __init__(self, samples: Samples, spec: LoaderSpec, batches: Batches) -> None:
        self._samples, self._spec, self._batches = samples, spec, batches
        self._worker = DaemonWorker("feed")
        self._ready: deque[Future[tuple[Any, ...]]] = deque()
        self._lock = threading.Lock()  # on a CPU, DALI calls from its own thread
        self.move(0, 0)

    def move(self, epoch: int, step: int) -> None:
        """Continue from this step of this epoch."""
        with self._lock:
            for batch in self._ready:
                batch.cancel()
            self._ready.clear()
            self._places = self._from(epoch, step)

    def __call__(self) -> tuple[Any, ...]:
        with self._lock:
            for place in itertools.islice(self._places, _FEED_AHEAD + 1 - len(self._ready)):
                self._ready.append(self._worker.submit(functools.partial(self._batch, *place)))
            batch = self._ready.popleft()
        return batch.result(self._spec.timeout)

    def close(self, seconds: float) -> bool:
        """End the thread. Returns whether it has ended within `seconds`."""
        with self._lock:
            for batch in self._ready:
                batch.cancel()
        return self._worker.close(seconds)

    def _from(self, epoch: int, step: int) -> Iterator[tuple[int, int, Int64]]:
        """Yield epoch, step and indices of each batch, without end."""
        while True:
            for indices in self._batches(epoch, step)[0]:
                yield epoch, step, indices
                step += 1
            epoch, step = epoch + 1, 0

    def _batch(self, epoch: int, step: int, indices: Int64) -> tuple[Any, ...]:
        """Return the inputs of DALI for a batch: for each input, a list of one array per sample."""
        spec, beton = self._spec, self._samples.beton
        if beton is None:
            read = [self._read(int(i)) for i in indices]
            payloads = [data for data, _ in read]
            heights, widths = np.array([shape for _, shape in read], np.int32).T
        else:
            heights, widths = beton.heights[indices], beton.widths[indices]
        where = cut = crop_boxes(spec, epoch=epoch, indices=indices, heights=heights, widths=widths)
        if beton is not None:
            payloads, cut = splice_batch(beton, indices, where)
        # The side is an input because it may change with the epoch, and batches are prefetched.
        side = np.full(2, spec.side(epoch), np.float32)
        tag = np.array([epoch, step], np.int64)
        repeated = ([side] * len(indices), [tag] * len(indices))
        return payloads, list(cut[:, :2]), list(cut[:, 2:4]), list(where), *repeated

    def _read(self, i: int) -> tuple[Uint8, tuple[int, int]]:
        """Return an encoded image, and its height and width after EXIF orientation."""
        try:
            data = bytes(self._samples.read(i))
            if data[:2] == b"\xff\xd8":
                height, width = read_header(data).upright
            else:
                _, height, width = decode(data).shape
        except ImageError as error:
            raise ImageError(f"{self._samples.location(i)}: {error}") from error
        return np.frombuffer(data, np.uint8), (height, width)


class DaliSource:
    """Crops of a folder, list or beton, decoded by DALI."""

    def __init__(
        self,
        samples: Samples,
        spec: LoaderSpec,
        *,
        shard: Shard,
        workers: int,
        device: torch.device,
    ) -> None:
        if spec.max_undecodable:
            raise ValueError(
                "engine=dali cannot mask undecodable samples: max_undecodable must be 0"
            )
        if samples.beton is not None and samples.beton.raw:
            raise ValueError(f"{samples.beton.path}: engine=dali reads JPEG samples only; use ffcv")
        self._samples, self._spec = samples, spec
        self._order = Order(len(samples), spec, shard, samples.labels)
        # Cached: the feed and the consumer request the same epochs.
        self._batches: Batches = functools.lru_cache(maxsize=2)(self._order.batches)
        self._feed = _Feed(samples, spec, self._batches)
        self._next: tuple[int, int] | None = None
        self.decode_errors = DecodeErrorBudget(0)
        self._graph = Graph(self._feed, samples, spec, workers=workers, device=device)

    def __len__(self) -> int:
        return self._order.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[RawBatch, None, None]:
        """See `pipelines.engines.source.Source.epoch`."""
        indices, valid = self._batches(epoch, start_step)
        if self._next != (epoch, start_step):
            self._feed.move(epoch, start_step)
        for step in range(start_step, self._order.steps):
            self._next = None
            images, where, _ = self._run(epoch, step)
            at = (epoch, step + 1) if step + 1 < self._order.steps else (epoch + 1, 0)
            self._next = at
            # Copies: `_batches` keeps the arrays.
            rows, keep = indices[step - start_step].copy(), valid[step - start_step].copy()
            labels = self._samples.labels[rows]
            yield RawBatch.from_arrays(images, labels, rows, keep, where)

    def close(self) -> None:
        """Release DALI's threads and memory pools, the feed's thread, and the data set."""
        # DALI may be stuck in the feed. Then `Graph.close` has waited long enough.
        self._feed.close(self._spec.timeout if self._graph.close() else STUCK_SECONDS)
        self._samples.close()

    def _run(self, epoch: int, step: int) -> Crops:
        """Return the crops of one step. Skips batches prefetched for other steps."""
        for _ in range(IN_FLIGHT + 1):
            try:
                crops = self._graph.next()
            except TimeoutError as error:
                limit = self._spec.timeout
                raise TimeoutError(f"no batch from DALI for {limit:.0f} s") from error
            except (RuntimeError, StopIteration) as error:
                raise self._find_undecodable(epoch, step, error) from error
            if crops.place == (epoch, step):
                return crops
        raise RuntimeError(f"DALI did not deliver step {step} of epoch {epoch}")

    def _find_undecodable(self, epoch: int, step: int, error: BaseException) -> Exception:
        """Return the error of the undecodable image, which DALI often does not name.

        Searches the batches in flight.
        """
        if isinstance(error.__cause__, TimeoutError):
            limit = self._spec.timeout
            return TimeoutError(f"the files of a batch could not be read for {limit:.0f} s")
        if isinstance(error.__cause__, ValueError):
            return error.__cause__
        indices, _ = self._order.batches(epoch, step)
        for i in indices[: PREFETCH + 2].reshape(-1):
            try:
                decode(self._samples.read(int(i)))
            except ImageError as reason:
                return ImageError(f"{self._samples.location(int(i))}: {reason}")
        return RuntimeError(f"DALI stopped at step {step} of epoch {epoch}: {error}")
