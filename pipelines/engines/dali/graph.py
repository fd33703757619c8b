"""DALI's graph: where images are decoded, what is decoded of them, and who resizes it.

On a CPU the graph delivers the cut regions, and `pipelines.imaging.resize` shrinks them straight into the
batch: DALI's own antialiased resize takes ten times as long there, longer than its decoder. On a
GPU DALI resizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn as _fn
from nvidia.dali import types as _types
from nvidia.dali.pipeline import pipeline_def as _pipeline_def
from torch.utils.dlpack import from_dlpack

from pipelines.arrays import Int32
from pipelines.beton.reader import Beton
from pipelines.engines.samples import Samples
from pipelines.imaging.resize import resize_region, scratch_size
from pipelines.native.threads import DaemonWorker, LaneThreads
from pipelines.sampling.crops import may_stick_out
from pipelines.spec import LoaderSpec

# DALI makes most of these names at import, where its own type stubs do not follow.
fn: Any = _fn
types: Any = _types
pipeline_def: Any = _pipeline_def

PREFETCH = 2
"""Batches that DALI decodes ahead of who takes them: its own default."""

_AHEAD = 1  # batches resized ahead of the consumer, beside those that DALI has decoded
IN_FLIGHT = 2 * PREFETCH + _AHEAD + 1
"""No more batches than these are between the feed and the consumer."""

_ENGINE_SHARE = 0.65  # of the images, to the GPU's JPEG engine: DALI's own default
STUCK_SECONDS = 0.2
"""To wait for the end of what has been waited for in vain."""

_LARGEST_HINT = 4096  # pixels; few images have more, and the memory is taken at once


class Crops(NamedTuple):
    """A batch, as the graph delivers it."""

    images: torch.Tensor
    """uint8 (B, S, S, 3), on the device; borrowed until the next batch is asked for."""
    boxes: torch.Tensor
    """int32 (B, 5)."""
    place: tuple[int, int]
    """Epoch and step."""


class _Plan(NamedTuple):
    """What the graph does with an image."""

    decoder: dict[str, Any]
    """Options of the decoder."""
    regions: bool
    """Whether it decodes the crop only, or all of the stream."""
    send: bool
    """Whether regions decoded on the CPU go to the GPU."""
    resize: bool
    """Whether DALI resizes and flips the regions, which must be on the GPU."""


class Graph:
    """DALI's pipeline, and on a CPU the threads that resize what it delivers."""

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
            # None, not 0: with a device id DALI wants a GPU even for a graph without one.
            device_id=_gpu(device) if device.type == "cuda" else None,
            prefetch_queue_depth=PREFETCH,
        )
        self._pipe.build()
        self._here, self._workers, self._timeout = not plan.resize, workers, spec.timeout
        # DALI waits without a clock: so does a thread that may be left behind.
        self._runner = DaemonWorker("regions")
        if self._here:
            # One of them is the consumer's.
            shape = (_AHEAD + 1, spec.batch_size * spec.crop.size**2 * 3)
            self._buffers, self._turn = torch.empty(shape, dtype=torch.uint8), 0
            self._ready: deque[Future[Crops]] = deque()
            self._crew = LaneThreads(workers, "resize")

    def next(self) -> Crops:
        """The batch that the feed gave next.

        Raises:
            TimeoutError: there was none for as long as the spec allows.
            RuntimeError: DALI's; its cause may be the feed's exception.
        """
        if not self._here:
            images, where, _, tag = self._result(self._runner.submit(self._pipe.run))
            return _crops(from_dlpack(images.as_tensor()), where.as_array(), tag)
        for _ in range(_AHEAD + 1 - len(self._ready)):
            self._ready.append(self._runner.submit(self._resized))
        crops: Crops = self._result(self._ready.popleft())
        return crops

    def close(self) -> bool:
        """Release DALI's threads and memory pools, and end ours, before the feed is closed.

        Returns:
            Whether all have ended: none is stuck.
        """
        for crops in self._ready if self._here else ():
            crops.cancel()
        ended = self._runner.close(self._timeout)
        if self._here and ended:
            self._crew.close()
        self._pipe = None
        return ended

    def _result(self, work: Future[Any]) -> Any:
        try:
            return work.result(self._timeout)
        except TimeoutError:
            self._timeout = STUCK_SECONDS  # closing waits no longer
            raise

    def _resized(self) -> Crops:
        """Resize and flip the regions of a batch; for the runner's thread."""
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

        self._crew.run(work, lanes)
        return _crops(images, boxes, tag)


def _crops(images: torch.Tensor, boxes: Int32, tag: Any) -> Crops:
    epoch, step = tag.as_array()[0].tolist()
    # A copy: DALI keeps the memory.
    return Crops(images, torch.from_numpy(boxes.copy()), (epoch, step))


def _resize(
    pixels: list[npt.NDArray[np.uint8]], flips: npt.NDArray[np.bool_], out: npt.NDArray[np.uint8]
) -> None:
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
        raise ValueError("decoder=mixed decodes on a GPU: give it one, or decoder=cpu")
    mixed = device.type == "cuda" and spec.decoder != "cpu"
    beton = samples if isinstance(samples, Beton) else None
    options: dict[str, Any] = {
        "device": "mixed" if mixed else "cpu",
        "output_type": types.RGB,
        # One rule for EXIF in all engines: upright. A beton is upright already.
        "adjust_orientation": beton is None,
    }
    share = _ENGINE_SHARE if spec.hw_decoder_load is None else spec.hw_decoder_load
    engine = mixed and share > 0
    if mixed:
        options["hw_decoder_load"] = share
    if engine and beton is not None:
        # Else its buffers grow, and the device waits, whenever a larger image comes.
        options["preallocate_width_hint"] = min(int(beton.widths.max()), _LARGEST_HINT)
        options["preallocate_height_hint"] = min(int(beton.heights.max()), _LARGEST_HINT)
    # Region decoding refuses boxes that stick out, and keeps the GPU's JPEG engine from working.
    regions = not engine and not may_stick_out(spec.crop)
    on_gpu = device.type == "cuda"
    return _Plan(options, regions, send=on_gpu and not mixed, resize=on_gpu)


@pipeline_def  # type: ignore[untyped-decorator]
def _graph(feed: Callable[[], tuple[Any, ...]], plan: _Plan) -> tuple[Any, ...]:
    """Encoded bytes, boxes and sides in; crops or regions, boxes, sides and places out."""
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
