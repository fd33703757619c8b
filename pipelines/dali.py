"""Engine: NVIDIA DALI. Decodes only the region of the crop on the CPU, or pictures with nvJPEG.

Where the beton has a side file of segments, the decoder is given the segments under the crop only,
as a small JPEG. So nvJPEG and the GPU's JPEG engine, which decode whole pictures, do regions, too.

Order and boxes are ours: `fn.external_source` feeds encoded bytes, so DALI's own epochs, padding
and seeds, which differ between ranks and policies, play no part. The feed runs on from epoch to
epoch and every batch carries its (epoch, step); a consumer that left early, or resumes elsewhere,
just discards what was prefetched. DALI cannot go on after a picture that it cannot decode: such a
sample ends the run by name.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn as _fn
from nvidia.dali import types as _types
from nvidia.dali.pipeline import pipeline_def as _pipeline_def
from torch.utils.dlpack import from_dlpack

from pipelines import samples as data_sets
from pipelines.augment import boxes, may_stick_out
from pipelines.batch import RawBatch
from pipelines.beton import Beton
from pipelines.decode import ImageError
from pipelines.faults import BadSamples
from pipelines.jpeg import JpegError, read_header
from pipelines.order import Int64, Order
from pipelines.picture import decode
from pipelines.samples import RAW, Samples
from pipelines.spec import LoaderSpec, Shard
from pipelines.splice import splice_batch

# DALI makes most of these names at import, where its own type stubs do not follow.
fn: Any = _fn
types: Any = _types
pipeline_def: Any = _pipeline_def

_PREFETCH = 2  # batches that DALI prepares in advance
"""DALI's own default; what is decoded runs this far ahead of the consumer."""

_LARGEST_HINT = 4096  # pixels; few pictures have more, and the memory is taken at once
_FEED_AHEAD = 1  # batches that the feed has ready beyond those that DALI has taken


class _Plan(NamedTuple):
    """What the graph does with a picture."""

    decoder: dict[str, Any]
    """Options of the decoder."""
    regions: bool
    """Whether it decodes the crop only, or all of the stream."""
    send: bool
    """Whether regions decoded on the CPU go to the GPU, where DALI resizes them: on a CPU that
    costs more than decoding them."""


class _Feed:
    """An endless supply of batches for `fn.external_source`, from a place that can be moved.

    DALI asks for a batch from within `run`, which is the consumer's time: a thread of the feed has
    it ready, files read and boxes drawn.
    """

    def __init__(self, samples: Samples, spec: LoaderSpec, order: Order) -> None:
        self._samples, self._spec, self._order = samples, spec, order
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._ready: deque[Future[tuple[Any, ...]]] = deque()
        self.move(0, 0)

    def move(self, epoch: int, step: int) -> None:
        """Go on from this step of this epoch."""
        for batch in self._ready:
            batch.cancel()
        self._ready.clear()
        self._places = self._from(epoch, step)

    def __call__(self) -> tuple[Any, ...]:
        for place in itertools.islice(self._places, _FEED_AHEAD + 1 - len(self._ready)):
            self._ready.append(self._pool.submit(self._batch, *place))
        return self._ready.popleft().result(self._spec.timeout)

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _from(self, epoch: int, step: int) -> Iterator[tuple[int, int, Int64]]:
        """Epoch, step and indices of one batch after the other, from epoch to epoch."""
        while True:
            for indices in self._order.batches(epoch, step)[0]:
                yield epoch, step, indices
                step += 1
            epoch, step = epoch + 1, 0

    def _batch(self, epoch: int, step: int, indices: Int64) -> tuple[Any, ...]:
        """What DALI is given for a batch, a list of one array per sample for each input."""
        samples, spec = self._samples, self._spec
        if isinstance(samples, Beton):
            heights, widths = samples.heights[indices], samples.widths[indices]
            where = boxes(spec, epoch=epoch, indices=indices, heights=heights, widths=widths)
            payloads, cut = splice_batch(samples, indices, where)
        else:
            payloads = [self._payload(int(i)) for i in indices]
            names = (data_sets.name(samples, int(i)) for i in indices)
            sizes = [_upright(*pair) for pair in zip(payloads, names, strict=True)]
            heights, widths = np.array(sizes, np.int32).T
            where = cut = boxes(spec, epoch=epoch, indices=indices, heights=heights, widths=widths)
        # An input: it may change with the epoch, and batches are prepared ahead.
        side = np.full(2, spec.side(epoch), np.float32)
        tag = np.array([epoch, step], np.int64)
        repeated = ([side] * len(indices), [tag] * len(indices))
        return payloads, list(cut[:, :2]), list(cut[:, 2:4]), list(where), *repeated

    def _payload(self, i: int) -> Any:
        try:
            return np.frombuffer(data_sets.encoded(self._samples, i), dtype=np.uint8)
        except ImageError as error:
            raise ImageError(f"{data_sets.name(self._samples, i)}: {error}") from error


def _upright(payload: Any, name: str) -> tuple[int, int]:
    """Height and width after EXIF orientation, from the header where it is a JPEG."""
    data = payload.tobytes()
    try:
        if data[:2] == b"\xff\xd8":
            return read_header(data).upright
        picture = decode(data)
    except (JpegError, ImageError) as error:
        raise ImageError(f"{name}: {error}") from error
    return picture.shape[1], picture.shape[2]


class DaliSource:
    """Decoded crops of a folder, list or beton, by DALI."""

    def __init__(
        self,
        samples: Samples,
        spec: LoaderSpec,
        *,
        shard: Shard,
        workers: int,
        device: torch.device,
    ) -> None:
        if spec.max_bad:
            raise ValueError("engine=dali cannot mask undecodable samples: max_bad must be 0")
        if isinstance(samples, Beton) and (samples.modes == RAW).any():
            raise ValueError(f"{samples.path}: engine=dali reads JPEG samples only; use ffcv")
        self._samples, self._spec = samples, spec
        self._order = Order(len(samples), spec, shard, samples.labels)
        self._feed = _Feed(samples, spec, self._order)
        self._next: tuple[int, int] | None = None
        self.bad = BadSamples(0)
        self._pipe: Any = _graph(
            self._feed,
            _plan(samples, spec, device),
            batch_size=spec.batch_size,
            num_threads=workers,
            # None, not 0: with a device id DALI wants a GPU even for a graph without one.
            device_id=_gpu(device) if device.type == "cuda" else None,
            prefetch_queue_depth=_PREFETCH,
        )
        self._pipe.build()

    def __len__(self) -> int:
        return self._order.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        """As `pipelines.loader.Source.epoch`."""
        indices, valid = self._order.batches(epoch, start_step)
        if self._next != (epoch, start_step):
            self._feed.move(epoch, start_step)
        for step in range(start_step, self._order.steps):
            images, where = self._run(epoch, step)
            at = (epoch, step + 1) if step + 1 < self._order.steps else (epoch + 1, 0)
            self._next = at
            row = step - start_step
            yield RawBatch(
                images,
                torch.from_numpy(self._samples.labels[indices[row]]),
                torch.from_numpy(indices[row]),
                torch.from_numpy(valid[row].copy()),
                where,
            )

    def close(self) -> None:
        """Release DALI's threads and memory pools, the feed's thread, and the file."""
        self._pipe = None
        self._feed.close()
        data_sets.close(self._samples)

    def _run(self, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The images and boxes of one step, past anything prefetched for another place."""
        for _ in range(2 * _PREFETCH + 2):
            try:
                images, where, tag = self._pipe.run()
            except (RuntimeError, StopIteration) as error:
                raise self._blame(epoch, step, error) from error
            if tuple(tag.as_array()[0]) == (epoch, step):
                # A copy: DALI keeps the memory.
                return from_dlpack(images.as_tensor()), torch.from_numpy(where.as_array().copy())
        raise RuntimeError(f"DALI did not deliver step {step} of epoch {epoch}")

    def _blame(self, epoch: int, step: int, error: BaseException) -> Exception:
        """DALI often does not say which picture it refused: find it among those in flight."""
        if isinstance(error.__cause__, TimeoutError):
            limit = self._spec.timeout
            return TimeoutError(f"the files of a batch could not be read for {limit:.0f} s")
        if isinstance(error.__cause__, ValueError):
            return error.__cause__
        indices, _ = self._order.batches(epoch, step)
        for i in indices[: _PREFETCH + 2].reshape(-1):
            try:
                decode(data_sets.encoded(self._samples, int(i)))
            except ImageError as reason:
                return ImageError(f"{data_sets.name(self._samples, int(i))}: {reason}")
        return RuntimeError(f"DALI stopped at step {step} of epoch {epoch}: {error}")


def _gpu(device: torch.device) -> int:
    index: int | None = device.index
    return torch.cuda.current_device() if index is None else index


def _plan(samples: Samples, spec: LoaderSpec, device: torch.device) -> _Plan:
    if spec.decoder == "mixed" and device.type != "cuda":
        raise ValueError("decoder=mixed decodes on a GPU: give it one, or decoder=cpu")
    mixed = device.type == "cuda" and spec.decoder != "cpu"
    beton = samples if isinstance(samples, Beton) else None
    options: dict[str, Any] = {
        "device": "mixed" if mixed else "cpu",
        "output_type": types.RGB,
        # One rule for EXIF in all engines: upright. A beton is upright already.
        "adjust_orientation": beton is None,
    }
    engine = mixed and spec.hw_decoder_load > 0
    if mixed:
        options["hw_decoder_load"] = spec.hw_decoder_load
    if engine and beton is not None:
        # Else its buffers grow, and the device waits, whenever a larger picture comes.
        options["preallocate_width_hint"] = min(int(beton.widths.max()), _LARGEST_HINT)
        options["preallocate_height_hint"] = min(int(beton.heights.max()), _LARGEST_HINT)
    # Region decoding refuses boxes that stick out, and keeps the GPU's JPEG engine from working.
    regions = not engine and not may_stick_out(spec.crop)
    return _Plan(options, regions, send=device.type == "cuda" and not mixed)


@pipeline_def  # type: ignore[untyped-decorator]
def _graph(feed: _Feed, plan: _Plan) -> tuple[Any, ...]:
    """Encoded bytes, boxes and sides in; uint8 (S, S, 3) crops and the boxes out."""
    payloads, corner, extent, where, side, tag = fn.external_source(
        source=feed,
        num_outputs=6,
        batch=True,
        dtype=[types.UINT8] + [types.INT32] * 3 + [types.FLOAT, types.INT64],
    )
    if plan.regions:
        images = fn.decoders.image_slice(
            payloads, start=corner, shape=extent, axes=[0, 1], **plan.decoder
        )
    else:
        images = fn.slice(
            fn.decoders.image(payloads, **plan.decoder),
            corner,
            extent,
            axes=[0, 1],
            out_of_bounds_policy="pad",
            fill_values=0,
        )
    if plan.send:
        images = images.gpu()
    images = fn.resize(images, size=side, interp_type=types.INTERP_LINEAR, antialias=True)
    return fn.flip(images, horizontal=where[4]), where, tag
