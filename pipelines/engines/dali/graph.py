"""DALI pipeline graph: decodes images or regions on CPU or GPU, crops and resizes.

On a CPU the graph returns cropped regions, and `pipelines.imaging.resize` resizes them into the
batch: DALI's own antialiased resize takes ten times as long there, longer than its decoder. On a
GPU, DALI resizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn as _fn
from nvidia.dali import types as _types
from nvidia.dali.pipeline import pipeline_def as _pipeline_def
from torch.utils.dlpack import from_dlpack

from pipelines.arrays import Bool, Int32, Uint8
from pipelines.imaging.resize import resize_region, scratch_size
from pipelines.native.threads import DaemonWorker, LaneThreads
from pipelines.samples import Samples
from pipelines.sampling.crops import can_exceed_image
from pipelines.spec import LoaderSpec

# DALI creates most of these names at import, so its type stubs lack them.
fn: Any = _fn
types: Any = _types
pipeline_def: Any = _pipeline_def

PREFETCH = 2
"""Batches that DALI decodes ahead of the consumer: its own default."""

_AHEAD = 1  # batches resized ahead of the consumer, beyond those that DALI has decoded
IN_FLIGHT = 2 * PREFETCH + _AHEAD + 1
"""Maximum number of batches between the feed and the consumer."""

_ENGINE_SHARE = 0.65  # share of images for the GPU's JPEG engine: DALI's own default
STUCK_SECONDS = 0.2
"""How long to wait for a thread to end after it has timed out."""

_LARGEST_HINT = 4096  # pixels; few images are larger, and the memory is allocated at once


class Crops(NamedTuple):
    """A batch of crops, as returned by the graph."""

    images: torch.Tensor
    """uint8 (B, S, S, 3), on the device. Borrowed until the next batch is requested."""
    boxes: Int32
    """int32 (B, 5): crop boxes."""
    place: tuple[int, int]
    """Epoch and step."""


class _Plan(NamedTuple):
    """Options of the graph."""

    decoder: dict[str, Any]
    """Arguments of the decoder."""
    regions: bool
    """Whether the decoder decodes only the crop, or the whole stream."""
    send: bool
    """Whether regions decoded on the CPU are copied to the GPU."""
    resize: bool
    """Whether DALI resizes and flips the regions, which must be on the GPU."""


class Graph:
    """DALI's pipeline, and on a CPU the threads that resize its regions."""

    def __init__(
        self,
        feed: Callable[[], tuple[Any, ...]],
        samples: Samples,
        spec: LoaderSpec,
        *,
        workers: int,
        device: torch.device,
    ) -> None:
        plan = _plan(samples, spec, device)
        self._pipe: Any = _graph(
            feed,
            plan,
            batch_size=spec.batch_size,
            num_threads=workers,
            # None, not 0: with a device id, DALI requires a GPU even if the graph uses none.
            device_id=_gpu(device) if device.type == "cuda" else None,
            prefetch_queue_depth=PREFETCH,
        )
        self._pipe.build()
        self._resize_here, self._workers, self._timeout = not plan.resize, workers, spec.timeout
        # DALI waits without a timeout, so it runs in a daemon thread, which may be abandoned.
        self._worker = DaemonWorker("regions")
        if self._resize_here:
            # One of the buffers belongs to the consumer.
            shape = (_AHEAD + 1, spec.batch_size * spec.crop.size**2 * 3)
            self._buffers, self._turn = torch.empty(shape, dtype=torch.uint8), 0
            self._ready: deque[Future[Crops]] = deque()
            self._lanes = LaneThreads(workers, "resize")

    def next(self) -> Crops:
        """Return the next batch, in the order of the feed.

        Raises:
            TimeoutError: There was no batch within the spec's timeout.
            RuntimeError: DALI failed. The cause may be the feed's exception.
        """
        if not self._resize_here:
            images, where, _, tag = self._result(self._worker.submit(self._pipe.run))
            return _crops(from_dlpack(images.as_tensor()), where.as_array(), tag)
        for _ in range(_AHEAD + 1 - len(self._ready)):
            self._ready.append(self._worker.submit(self._next_resized))
        crops: Crops = self._result(self._ready.popleft())
        return crops

    def close(self) -> bool:
        """Release DALI's threads and memory pools, and end our threads. Close the feed afterwards.

        Returns:
            Whether all threads have ended, so that none is stuck.
        """
        for crops in self._ready if self._resize_here else ():
            crops.cancel()
        ended = self._worker.close(self._timeout)
        if self._resize_here and ended:
            self._lanes.close()
        self._pipe = None
        return ended

    def _result(self, work: Future[Any]) -> Any:
        try:
            return work.result(self._timeout)
        except TimeoutError:
            self._timeout = STUCK_SECONDS  # `close` does not wait as long again
            raise

    def _next_resized(self) -> Crops:
        """Resize and flip the regions of a batch. Runs in the worker's thread."""
        regions, where, side, tag = self._pipe.run()
        pixels, boxes = [np.asarray(region) for region in regions], where.as_array()
        shape = (len(pixels), int(side.at(0)[0]), int(side.at(0)[1]), 3)
        images = self._buffers[self._turn][: int(np.prod(shape))].view(shape)
        self._turn = (self._turn + 1) % len(self._buffers)
        flips, out = boxes[:, 4] != 0, images.numpy()
        lanes = min(self._workers, len(pixels))

        def work(lane: int) -> None:
            rows = slice(lane, None, lanes)
            _resize(pixels[rows], flips[rows], out[rows])

        self._lanes.run(work, lanes)
        return _crops(images, boxes, tag)


def _crops(images: torch.Tensor, boxes: Int32, tag: Any) -> Crops:
    epoch, step = tag.as_array()[0].tolist()
    # A copy: the memory belongs to DALI.
    return Crops(images, boxes.copy(), (epoch, step))


def _resize(pixels: list[Uint8], flips: Bool, out: Uint8) -> None:
    heights, widths, _ = zip(*(region.shape for region in pixels), strict=True)
    side = out.shape[1]
    scratch = np.empty(scratch_size(max(heights), max(widths), side), np.uint32)
    for region, height, width, flip, square in zip(
        pixels, heights, widths, flips.tolist(), out, strict=True
    ):
        begin, target = region.ctypes.data, square.ctypes.data
        resize_region(begin, 3 * width, height, width, target, side, flip, scratch)


def _gpu(device: torch.device) -> int:
    index: int | None = device.index
    return torch.cuda.current_device() if index is None else index


def _plan(samples: Samples, spec: LoaderSpec, device: torch.device) -> _Plan:
    if spec.decoder == "mixed" and device.type != "cuda":
        raise ValueError("decoder=mixed decodes on a GPU: use a GPU, or decoder=cpu")
    mixed = device.type == "cuda" and spec.decoder != "cpu"
    beton = samples.beton
    options: dict[str, Any] = {
        "device": "mixed" if mixed else "cpu",
        "output_type": types.RGB,
        # All engines apply EXIF orientation. Images in a beton are upright already.
        "adjust_orientation": beton is None,
    }
    share = _ENGINE_SHARE if spec.hw_decoder_load is None else spec.hw_decoder_load
    engine = mixed and share > 0
    if mixed:
        options["hw_decoder_load"] = share
    if engine and beton is not None:
        # Without hints, buffers grow at each larger image, and the device waits.
        options["preallocate_width_hint"] = min(int(beton.widths.max()), _LARGEST_HINT)
        options["preallocate_height_hint"] = min(int(beton.heights.max()), _LARGEST_HINT)
    # Region decoding rejects crop boxes that extend beyond the image, and it disables the GPU's
    # JPEG engine.
    regions = not engine and not can_exceed_image(spec.crop)
    on_gpu = device.type == "cuda"
    return _Plan(options, regions, send=on_gpu and not mixed, resize=on_gpu)


@pipeline_def  # type: ignore[untyped-decorator]
def _graph(feed: Callable[[], tuple[Any, ...]], plan: _Plan) -> tuple[Any, ...]:
    """Define the graph.

    Inputs: encoded bytes, crop boxes, sides, (epoch, step). Outputs: crops or regions, crop boxes,
    sides, (epoch, step).
    """
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
    if plan.resize:
        images = fn.resize(images, size=side, interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.flip(images, horizontal=where[4])
    return images, where, side, tag
