"""FFCV's loader, repaired: its C decoder, its pipeline and its ring of pinned buffers.

Stock FFCV has faults that matter in long runs. Subclasses here and in
`pipelines.engines.ffcv.source` repair them:

- It ignores the decoder's return code, so a broken JPEG yields an earlier image of the buffer under
  this sample's label. `_CropDecoder` writes a status, and the sample is black and not valid.
- It draws crops from one generator per thread. Here crop boxes come from
  `pipelines.sampling.crops`, by sample.
- It allocates a ring of buffers in every epoch. `RingLoader` keeps one for its lifetime.
- Its import sets torch to one CPU thread and compiles a dictionary. Both are undone.
- Its memory managers make array types read-only that numba shares with every compiled function of
  the process. Here none is asked for a type.
- It builds dictionaries of all samples on opening. `RingLoader` uses the arrays of
  `pipelines.beton.reader`.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import llvmlite.binding
import numba.typed
import numpy as np
import torch

from pipelines.arrays import Int32, Int64
from pipelines.batch import Regions
from pipelines.beton.reader import Beton
from pipelines.beton.segments import RECORD
from pipelines.engines.ffcv import kernels
from pipelines.imaging.resize import scratch_size
from pipelines.native.threads import LaneThreads
from pipelines.sampling.crops import crop_boxes, padded_side
from pipelines.spec import LoaderSpec

__all__ = ["AHEAD", "DecodedBatch", "RingLoader", "Step", "StockEpochIterator"]


@contextlib.contextmanager
def _importing_ffcv() -> Iterator[None]:
    """Restore the number of torch's threads, which importing FFCV changes.

    Also substitutes a plain dictionary for FFCV's typed one of two entries, which numba would
    compile for five seconds.
    """
    threads, typed = torch.get_num_threads(), numba.typed.Dict
    numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = typed
        torch.set_num_threads(threads)


with _importing_ffcv():
    from ffcv.fields.rgb_image import RGBImageField, SimpleRGBImageDecoder
    from ffcv.libffcv import ctypes_imdecode
    from ffcv.loader import Loader as StockLoader
    from ffcv.loader.epoch_iterator import EpochIterator as StockEpochIterator
    from ffcv.loader.epoch_iterator import select_buffer
    from ffcv.pipeline import Compiler, PipelineSpec
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.graph import Graph

llvmlite.binding.add_symbol(kernels.IMDECODE, ctypes.cast(ctypes_imdecode, ctypes.c_void_p).value)

AHEAD = 3
"""Maximum number of decoded batches that wait for the consumer."""

_SLOTS = AHEAD + 2  # plus one that the consumer holds and one that is being decoded
_LINE = 64  # bytes of a cache line; buffers of lanes are multiples of it


class Step(NamedTuple):
    """A step to decode."""

    epoch: int
    step: int
    indices: Int64
    """(B,): positions in the data set."""
    valid: Any
    """bool (B,): False for padding."""


class DecodedBatch(NamedTuple):
    """A decoded step. The consumer owns all but the images."""

    step: Step
    images: torch.Tensor | Regions
    """As `RawBatch.images`."""
    boxes: Int32
    """(B, 5): crop boxes."""
    status: Any
    """uint8 (B,): `kernels.OK`, `UNDECODABLE` or `DAMAGED`."""


class _CropDecoder(SimpleRGBImageDecoder):  # type: ignore[misc]
    """FFCV operation: decode and crop; resize and flip, or leave that to the device."""

    def __init__(self, tables: _Tables) -> None:
        super().__init__()
        self._tables = tables

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, AllocationQuery | None]:
        size = self._tables.spec.crop.size
        shape, dtype = (size, size, 3), np.dtype("u1")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=dtype)
        device = self._tables.spec.resize == "device"
        return state, None if device else AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Any]:
        tables = self._tables

        def decode_batch(indices, destination, _metadata, state):  # type: ignore[no-untyped-def]
            if destination is None:
                regions = tables.regions()
                result: torch.Tensor | Regions = regions
                out, offsets, side = regions.pixels.numpy(), regions.offsets.numpy(), 0
            else:
                side = tables.side
                size = side * side * 3
                out = destination.reshape(-1)[: len(indices) * size]
                offsets = np.arange(len(indices)) * size
                result = torch.from_numpy(out.reshape(len(indices), side, side, 3))
            lanes = tables.lanes

            def work(lane: int) -> None:
                kernels.decode_lane(indices, out, offsets, side, state, lane, lanes)

            tables.threads.run(work, lanes)
            return result

        return decode_batch


class _Tables:
    """Tables of the beton, and state of the batch being decoded.

    They replace FFCV's memory manager and its context. Only the loader's thread, which decodes one
    batch at a time, writes to them.
    """

    def __init__(self, beton: Beton, spec: LoaderSpec, lanes: int) -> None:
        self.spec, self.lanes, self.side = spec, lanes, spec.crop.size
        self.threads = LaneThreads(lanes)
        self._regions = [torch.empty(0, dtype=torch.uint8)] * _SLOTS
        self._slot = 0
        sizes, heights, widths = beton.sizes, beton.heights, beton.widths
        tall, wide = int(heights.max()), int(widths.max())
        patch = padded_side(spec.crop, heights, widths)
        region = (max(tall, patch), max(wide, patch))
        # zeros: pages that are never written take no memory, so a beton without a side file pays
        # nothing for records.
        records, lengths = np.zeros(len(sizes), RECORD), np.zeros(1, np.uint16)
        if beton.segments is not None:
            records, lengths = beton.segments.records, beton.segments.lengths
        # Read-only views in all cases: numba would compile again for another type.
        records, lengths = records[:], lengths[:]
        records.flags.writeable = lengths.flags.writeable = False

        def buffers(size: int, dtype: type[np.generic] = np.uint8) -> Any:
            return np.empty((lanes, -(-size // _LINE) * _LINE), dtype)

        self.state = kernels.State(
            data=beton.data,
            offsets=beton.offsets,
            sizes=sizes,
            heights=heights,
            widths=widths,
            modes=beton.modes,
            records=records,
            lengths=lengths,
            boxes=np.zeros((spec.batch_size, 5), np.int32),
            work_order=np.zeros(spec.batch_size, np.int64),
            status=np.zeros(spec.batch_size, np.uint8),
            spliced=buffers(int(sizes.max())),
            images=buffers(int((heights.astype(np.int64) * widths).max()) * 3),
            patches=buffers(patch * patch * 3),
            scratch=buffers(scratch_size(*region, spec.crop.size), np.uint32),
        )

    def begin(self, step: Step, slot: int) -> None:
        """Compute the crop boxes of a step, and order its samples by cost."""
        self.side, self._slot = self.spec.side(step.epoch), slot
        state, indices = self.state, step.indices
        heights, widths = state.heights[indices], state.widths[indices]
        state.boxes[:] = crop_boxes(
            self.spec, epoch=step.epoch, indices=indices, heights=heights, widths=widths
        )
        share = state.boxes[:, 2] / heights * (state.boxes[:, 3] / widths)
        cuttable = state.records["interval"][indices] > 0
        cost = state.sizes[indices] * np.where(cuttable, np.minimum(share, 1), 1)
        state.work_order[:] = np.argsort(-cost)

    def regions(self) -> Regions:
        """Return regions of the batch to write to. Grows the buffer of the slot if needed."""
        shapes, flips = self.state.boxes[:, 2:4].copy(), self.state.boxes[:, 4] != 0
        sizes = shapes.astype(np.int64).prod(axis=1) * 3
        ends = np.cumsum(sizes)
        total = int(ends[-1])
        if len(self._regions[self._slot]) < total:
            pin = torch.cuda.is_available()
            buffer = torch.empty(total + total // 4, dtype=torch.uint8, pin_memory=pin)
            self._regions[self._slot] = buffer
        return Regions(
            self._regions[self._slot][:total],
            torch.from_numpy(ends - sizes),
            torch.from_numpy(shapes),
            torch.from_numpy(flips),
            self.side,
        )


class RingLoader(StockLoader):  # type: ignore[misc]
    """FFCV's loader over arrays, with one ring of buffers for its lifetime."""

    def __init__(self, beton: Beton, spec: LoaderSpec, lanes: int) -> None:
        # The stock initialiser is not called: it builds sets and dictionaries with one entry per
        # sample, and draws an order that we do not use.
        self.tables = _Tables(beton, spec, lanes)
        self.metadata = {"f0": np.zeros(1, np.uint8)}  # the kernel reads the tables instead
        specs = {"image": PipelineSpec("image", _CropDecoder(self.tables))}
        fields = {"image": RGBImageField()}
        self.graph = Graph(specs, fields, {"image": 0}, self.metadata, None)
        # The kernel is compiled and cached on disk. FFCV would compile its caller for every
        # loader, six seconds each time.
        Compiler.set_enabled(False)
        try:
            self.generate_code()
        finally:
            Compiler.set_enabled(True)
        # Once; stock FFCV allocates in every epoch. FFCV pins the memory if there is a GPU.
        self._buffers = self.graph.allocate_memory(spec.batch_size, _SLOTS)

    def decode(self, step: Step, number: int) -> DecodedBatch:
        """Decode one step. Its images stay in the ring until four more steps are decoded.

        Like stock's `EpochIterator.run_pipeline`, but outside CUDA streams. Nothing here runs on a
        GPU, and entering a stream from a thread whose device is 0 makes every rank allocate on
        GPU 0.

        Args:
            step: The step.
            number: Counts the decoded steps; selects the slot of the ring.
        """
        slot, tables = number % _SLOTS, self.tables
        tables.begin(step, slot)
        args: dict[str, Any] = {
            "batch_indices": step.indices,
            "storage_state": tables.state,
            "metadata": self.metadata,
        }
        for kind, prefix in (("operation", "memory_"), ("shared", "shared_memory_")):
            for node, buffer in self._buffers[kind].items():
                args[prefix + str(node)] = select_buffer(buffer, slot, len(step.indices))
        code, outputs = self.code
        for stage, defined in code:
            for node, result in zip(defined, stage(**args), strict=True):
                args[f"result_{node}"] = result
        (output,) = outputs
        images: torch.Tensor | Regions = args[f"result_{output}"]
        return DecodedBatch(step, images, tables.state.boxes.copy(), tables.state.status.copy())

    def close(self) -> None:
        """End the threads. No batch may be in decoding."""
        self.tables.threads.close()
