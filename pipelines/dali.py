"""Engine: NVIDIA DALI. Decodes only the region of the crop, on the CPU or with nvJPEG.

Order and boxes are ours: `fn.external_source` feeds encoded bytes, so DALI's own epochs, padding
and seeds, which differ between ranks and policies, play no part. The feed runs on from epoch to
epoch and every batch carries its (epoch, step); a consumer that left early, or resumes elsewhere,
just discards what was prefetched. DALI cannot go on after a picture that it cannot decode: such a
sample ends the run by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

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

# DALI makes most of these names at import, where its own type stubs do not follow.
fn: Any = _fn
types: Any = _types
pipeline_def: Any = _pipeline_def

_PREFETCH = 2  # batches that DALI prepares in advance
"""DALI's own default; the feed below may run this far ahead of the consumer."""


class _Feed:
    """An endless supply of batches for `fn.external_source`, from a place that can be moved."""

    def __init__(self, samples: Samples, spec: LoaderSpec, order: Order) -> None:
        self._samples, self._spec, self._order = samples, spec, order
        self.move(0, 0)

    def move(self, epoch: int, step: int) -> None:
        """Go on from this step of this epoch."""
        self._epoch, self._start = epoch, step
        self._step = step
        self.indices, self.valid = self._order.batches(epoch, step)

    def __call__(self) -> tuple[Any, ...]:
        if self._step == self._order.steps:
            self.move(self._epoch + 1, 0)
        indices = self.indices[self._step - self._start]
        tag = np.array([self._epoch, self._step], np.int64)
        side = np.full(2, self._spec.side(self._epoch), np.float32)
        payloads = [self._payload(int(i)) for i in indices]
        heights, widths = self._sizes(indices, payloads)
        where = boxes(
            self._spec, epoch=self._epoch, indices=indices, heights=heights, widths=widths
        )
        self._step += 1
        return (
            payloads,
            list(where[:, :2].astype(np.int32)),
            list(where[:, 2:4].astype(np.int32)),
            list(where[:, 4:5].astype(np.int32)),
            # An input: it may change with the epoch, and batches are prepared ahead.
            [side] * len(indices),
            [tag] * len(indices),
        )

    def _payload(self, i: int) -> Any:
        try:
            return np.frombuffer(data_sets.encoded(self._samples, i), dtype=np.uint8)
        except ImageError as error:
            raise ImageError(f"{data_sets.name(self._samples, i)}: {error}") from error

    def _sizes(self, indices: Int64, payloads: list[Any]) -> tuple[Any, Any]:
        """Heights and widths of the upright pictures, int32 (B,)."""
        if isinstance(self._samples, Beton):
            return self._samples.heights[indices], self._samples.widths[indices]
        sizes = [
            _upright(payload, data_sets.name(self._samples, int(i)))
            for i, payload in zip(indices, payloads, strict=True)
        ]
        heights, widths = np.array(sizes, np.int32).T
        return heights, widths


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
        self._order = Order(len(samples), spec, shard)
        self._feed = _Feed(samples, spec, self._order)
        self._next: tuple[int, int] | None = None
        self.bad = BadSamples(0)
        if spec.decoder == "mixed" and device.type != "cuda":
            raise ValueError("decoder=mixed decodes on a GPU: give it one, or decoder=cpu")
        on_gpu = device.type == "cuda" and spec.decoder != "cpu"
        place: Literal["cpu", "mixed"] = "mixed" if on_gpu else "cpu"
        self._pipe: Any = _graph(
            self._feed,
            spec,
            place,
            # One rule for EXIF in all engines: upright. A beton is upright already.
            adjust=not isinstance(samples, Beton),
            batch_size=spec.batch_size,
            num_threads=workers,
            # None, not 0: with a device id DALI wants a GPU even for a graph without one.
            device_id=_gpu(device) if place == "mixed" else None,
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
        """Release DALI's threads and memory pools, and the file."""
        self._pipe = None
        data_sets.close(self._samples)

    def _run(self, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The images and boxes of one step, past anything prefetched for another place."""
        for _ in range(2 * _PREFETCH + 2):
            try:
                images, corner, extent, flip, tag = self._pipe.run()
            except (RuntimeError, StopIteration) as error:
                raise self._blame(epoch, step, error) from error
            if tuple(tag.as_array()[0]) == (epoch, step):
                parts = [np.asarray(part.as_array()) for part in (corner, extent, flip)]
                where = np.ascontiguousarray(np.concatenate(parts, axis=1), np.int32)
                return from_dlpack(images.as_tensor()), torch.from_numpy(where)
        raise RuntimeError(f"DALI did not deliver step {step} of epoch {epoch}")

    def _blame(self, epoch: int, step: int, error: BaseException) -> ValueError | RuntimeError:
        """DALI often does not say which picture it refused: find it among those in flight."""
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


@pipeline_def  # type: ignore[untyped-decorator]
def _graph(feed: _Feed, spec: LoaderSpec, place: str, adjust: bool) -> tuple[Any, ...]:
    """Encoded bytes, boxes and sides in; uint8 (S, S, 3) crops and the same boxes out."""
    payloads, corner, extent, flip, side, tag = fn.external_source(
        source=feed,
        num_outputs=6,
        batch=True,
        dtype=[types.UINT8] + [types.INT32] * 3 + [types.FLOAT, types.INT64],
    )
    if may_stick_out(spec.crop):
        # Region decoding refuses such boxes.
        images = fn.decoders.image(
            payloads, device=place, output_type=types.RGB, adjust_orientation=adjust
        )
        images = fn.slice(
            images, corner, extent, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0
        )
    else:
        images = fn.decoders.image_slice(
            payloads,
            start=corner,
            shape=extent,
            axes=[0, 1],
            device=place,
            output_type=types.RGB,
            adjust_orientation=adjust,
        )
    images = fn.resize(images, size=side, interp_type=types.INTERP_LINEAR, antialias=True)
    images = fn.flip(images, horizontal=flip)
    return images, corner, extent, flip, tag
