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
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines.arrays import Int64
from pipelines.batch import RawBatch
from pipelines.beton.reader import Beton
from pipelines.beton.splicing import splice_batch
from pipelines.engines.dali.graph import IN_FLIGHT, PREFETCH, STUCK_SECONDS, Crops, Graph
from pipelines.engines.samples import RAW, Samples, close_samples, read_encoded, sample_name
from pipelines.engines.source import DecodeErrorBudget
from pipelines.imaging.decode import ImageError
from pipelines.imaging.torchvision_decode import decode
from pipelines.jpeg.markers import read_header
from pipelines.native.threads import DaemonWorker
from pipelines.sampling.crops import crop_boxes
from pipelines.sampling.order import Order
from pipelines.spec import LoaderSpec, Shard

Batches = Callable[[int, int], tuple[Int64, npt.NDArray[np.bool_]]]
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
        samples, spec = self._samples, self._spec
        if isinstance(samples, Beton):
            heights, widths = samples.heights[indices], samples.widths[indices]
            where = crop_boxes(spec, epoch=epoch, indices=indices, heights=heights, widths=widths)
            payloads, cut = splice_batch(samples, indices, where)
        else:
            payloads = [self._payload(int(i)) for i in indices]
            names = (sample_name(samples, int(i)) for i in indices)
            sizes = [_upright(*pair) for pair in zip(payloads, names, strict=True)]
            heights, widths = np.array(sizes, np.int32).T
            where = cut = crop_boxes(
                spec, epoch=epoch, indices=indices, heights=heights, widths=widths
            )
        # The side is an input because it may change with the epoch, and batches are prefetched.
        side = np.full(2, spec.side(epoch), np.float32)
        tag = np.array([epoch, step], np.int64)
        repeated = ([side] * len(indices), [tag] * len(indices))
        return payloads, list(cut[:, :2]), list(cut[:, 2:4]), list(where), *repeated

    def _payload(self, i: int) -> Any:
        try:
            return np.frombuffer(read_encoded(self._samples, i), dtype=np.uint8)
        except ImageError as error:
            raise ImageError(f"{sample_name(self._samples, i)}: {error}") from error


def _upright(payload: Any, name: str) -> tuple[int, int]:
    """Return height and width after EXIF orientation. Of a JPEG, reads the header only."""
    data = payload.tobytes()
    try:
        if data[:2] == b"\xff\xd8":
            return read_header(data).upright
        image = decode(data)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    return image.shape[1], image.shape[2]


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
        if isinstance(samples, Beton) and (samples.modes == RAW).any():
            raise ValueError(f"{samples.path}: engine=dali reads JPEG samples only; use ffcv")
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

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        """See `pipelines.engines.source.Source.epoch`."""
        indices, valid = self._batches(epoch, start_step)
        if self._next != (epoch, start_step):
            self._feed.move(epoch, start_step)
        for step in range(start_step, self._order.steps):
            self._next = None
            images, where, _ = self._run(epoch, step)
            at = (epoch, step + 1) if step + 1 < self._order.steps else (epoch + 1, 0)
            self._next = at
            row = step - start_step
            yield RawBatch(
                images,
                torch.from_numpy(self._samples.labels[indices[row]]),
                torch.from_numpy(indices[row].copy()),
                torch.from_numpy(valid[row].copy()),
                where,
            )

    def close(self) -> None:
        """Release DALI's threads and memory pools, the feed's thread, and the data set."""
        # DALI may be stuck in the feed. Then `Graph.close` has waited long enough.
        self._feed.close(self._spec.timeout if self._graph.close() else STUCK_SECONDS)
        close_samples(self._samples)

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
                decode(read_encoded(self._samples, int(i)))
            except ImageError as reason:
                return ImageError(f"{sample_name(self._samples, int(i))}: {reason}")
        return RuntimeError(f"DALI stopped at step {step} of epoch {epoch}: {error}")
