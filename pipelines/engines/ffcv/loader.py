"""FFCV's loader as the engine runs it: its C decoder, its pipeline and its ring of pinned buffers.

Stock FFCV has faults that a long run meets; the parts concerned are subclassed here, its thread in
`pipelines.engines.ffcv.source`:

- the decoder's return code is dropped, so a broken JPEG shows the buffer's earlier image under
  this sample's label: `_CropDecoder` writes a status, and the sample is blank and not valid;
- crops are drawn from per-thread generators: boxes come from `pipelines.sampling.crops`, by sample;
- every epoch allocates a ring of its own: `RingLoader` has one for its life;
- the package sets torch to one CPU thread, and compiles a dictionary, at import: both undone;
- opening builds dictionaries per sample: `RingLoader` takes the tables of `pipelines.beton.reader`.
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
from pipelines.sampling.crops import crop_boxes, patch_side
from pipelines.spec import LoaderSpec

__all__ = ["AHEAD", "Decoded", "RingLoader", "Step", "StockEpochIterator"]


@contextlib.contextmanager
def _importing_ffcv() -> Iterator[None]:
    """Undo what importing FFCV does to torch's threads, and spare the five seconds in which numba
    compiles the typed dictionary of two entries that FFCV keeps: a plain one does."""
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
"""Batches that may wait for the consumer."""

_SLOTS = AHEAD + 2  # and one that it holds, and one that is being decoded
_LINE = 64  # lanes' buffers are whole cache lines long


class Step(NamedTuple):
    """What is to be decoded."""

    epoch: int
    step: int
    indices: Int64
    """(B,)."""
    valid: Any
    """bool (B,)."""


class Decoded(NamedTuple):
    """A step that was decoded; all but the images belongs to the consumer."""

    step: Step
    images: torch.Tensor | Regions
    boxes: Int32
    """(B, 5)."""
    status: Any
    """uint8 (B,): as `kernels.OK` and its neighbours."""


class _CropDecoder(SimpleRGBImageDecoder):  # type: ignore[misc]
    """Decode, cut the given boxes, resize and flip, or leave that to the device."""

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
                made: torch.Tensor | Regions = regions
                out, offsets, side = regions.pixels.numpy(), regions.offsets.numpy(), 0
            else:
                side = tables.side
                size = side * side * 3
                out = destination.reshape(-1)[: len(indices) * size]
                offsets = np.arange(len(indices)) * size
                made = torch.from_numpy(out.reshape(len(indices), side, side, 3))
            lanes = tables.lanes

            def work(lane: int) -> None:
                kernels.decode_lane(indices, out, offsets, side, state, lane, lanes)

            tables.crew.run(work, lanes)
            return made

        return decode_batch


class _Tables:
    """The beton's tables, and what belongs to the batch being decoded.

    What FFCV keeps in a memory manager and its context, without their pages.
    Written by the loader's thread only, which decodes one batch at a time.
    """

    def __init__(self, beton: Beton, spec: LoaderSpec, lanes: int) -> None:
        self.spec, self.lanes, self.side = spec, lanes, spec.crop.size
        self.crew = LaneThreads(lanes)
        self._regions = [torch.empty(0, dtype=torch.uint8)] * _SLOTS
        self._slot = 0
        sizes, heights, widths = beton.sizes, beton.heights, beton.widths
        tall, wide = int(heights.max()), int(widths.max())
        patch = patch_side(spec.crop, heights, widths)
        region = (max(tall, patch), max(wide, patch))
        # Calloc'd, so that a beton that cannot be cut costs no memory for records.
        records, lengths = np.zeros(len(beton), RECORD), np.zeros(1, np.uint16)
        if beton.segments is not None:
            records, lengths = beton.segments.records, beton.segments.lengths
        # Views, read-only: one type for all, or numba would compile again.
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
            turns=np.zeros(spec.batch_size, np.int64),
            status=np.zeros(spec.batch_size, np.uint8),
            spliced=buffers(int(sizes.max())),
            images=buffers(int((heights.astype(np.int64) * widths).max()) * 3),
            patches=buffers(patch * patch * 3),
            scratch=buffers(scratch_size(*region, spec.crop.size), np.uint32),
        )

    def begin(self, step: Step, slot: int) -> None:
        """Draw the boxes of a step, and give each lane images that cost about the same."""
        self.side, self._slot = self.spec.side(step.epoch), slot
        state, indices = self.state, step.indices
        heights, widths = state.heights[indices], state.widths[indices]
        state.boxes[:] = crop_boxes(
            self.spec, epoch=step.epoch, indices=indices, heights=heights, widths=widths
        )
        share = state.boxes[:, 2] / heights * (state.boxes[:, 3] / widths)
        cuttable = state.records["interval"][indices] > 0
        cost = state.sizes[indices] * np.where(cuttable, np.minimum(share, 1), 1)
        state.turns[:] = np.argsort(-cost)

    def regions(self) -> Regions:
        """Room for the batch's regions; the slot's buffer grows where it is too small."""
        shapes, flips = self.state.boxes[:, 2:4].copy(), self.state.boxes[:, 4] != 0
        sizes = shapes.astype(np.int64).prod(axis=1) * 3
        ends = np.cumsum(sizes)
        total = int(ends[-1])
        if len(self._regions[self._slot]) < total:
            pin = torch.cuda.is_available()
            room = torch.empty(total + total // 4, dtype=torch.uint8, pin_memory=pin)
            self._regions[self._slot] = room
        return Regions(
            self._regions[self._slot][:total],
            torch.from_numpy(ends - sizes),
            torch.from_numpy(shapes),
            torch.from_numpy(flips),
            self.side,
        )


class RingLoader(StockLoader):  # type: ignore[misc]
    """FFCV's loader over arrays, with one ring of buffers for its whole life."""

    def __init__(self, beton: Beton, spec: LoaderSpec, lanes: int) -> None:
        # Not calling the stock initialiser is the point: it builds sets and dictionaries with one
        # entry per sample, and draws an order that we do not use.
        self.tables = _Tables(beton, spec, lanes)
        self.metadata = {"f0": np.zeros(1, np.uint8)}  # the kernel reads the tables instead
        specs = {"image": PipelineSpec("image", _CropDecoder(self.tables))}
        fields = {"image": RGBImageField()}
        self.graph = Graph(specs, fields, {"image": 0}, self.metadata, None)
        # The kernel is compiled already, and kept on disk; FFCV would compile what calls it
        # again for every loader, six seconds each time.
        Compiler.set_enabled(False)
        try:
            self.generate_code()
        finally:
            Compiler.set_enabled(True)
        # Once: stock does so for every epoch. Pinned by FFCV where there is a GPU.
        self._buffers = self.graph.allocate_memory(spec.batch_size, _SLOTS)

    def decode(self, step: Step, number: int) -> Decoded:
        """Decode one step; its images lie in the ring until four more were decoded.

        As stock's `EpochIterator.run_pipeline`, but outside CUDA streams: nothing of ours runs on a
        GPU here, and entering a stream from a thread whose device is 0 makes every rank allocate on
        GPU 0.
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
        return Decoded(step, images, tables.state.boxes.copy(), tables.state.status.copy())

    def close(self) -> None:
        """End the threads, when no batch is being decoded."""
        self.tables.crew.close()
