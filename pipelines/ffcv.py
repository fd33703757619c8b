"""Engine: FFCV. Decodes a beton with FFCV's C library, threads and ring of pinned buffers.

Stock FFCV has faults that a long run meets; the parts concerned are subclassed here:

- an exception in the loader's thread ends the thread and leaves the consumer waiting for ever:
  `_EpochIterator.run` hands it over, `__next__` raises it and watches the clock;
- the decoder's return code is dropped, so a broken JPEG shows the buffer's earlier picture under
  this sample's label: `_CropDecoder` writes a status, and the sample is blank and not valid;
- crops are drawn from per-thread generators: boxes come from `pipelines.augment`, by sample;
- leaving an epoch early leaks a thread and all buffers: `_EpochIterator.close` ends and joins it;
- the package sets torch to one CPU thread, at import and at every epoch: undone;
- opening builds dictionaries per sample: `_Loader` takes the tables of `pipelines.beton` as arrays.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch

from pipelines import samples as data_sets
from pipelines.augment import boxes, patch_side
from pipelines.batch import RawBatch
from pipelines.beton import Beton
from pipelines.decode import ImageError
from pipelines.faults import BadSamples
from pipelines.order import Int64, Order
from pipelines.picture import crop, decode
from pipelines.spec import LoaderSpec, Shard


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Undo the `torch.set_num_threads` calls that FFCV makes inside."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


with torch_threads_kept():
    from ffcv.fields.rgb_image import RGBImageField, SimpleRGBImageDecoder
    from ffcv.libffcv import ctypes_imdecode, ctypes_resize
    from ffcv.loader import Loader as StockLoader
    from ffcv.loader.epoch_iterator import EpochIterator as StockEpochIterator
    from ffcv.loader.epoch_iterator import select_buffer
    from ffcv.memory_managers.base import MemoryContext, MemoryManager
    from ffcv.pipeline import Compiler, PipelineSpec
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.graph import Graph

from pipelines import kernels  # noqa: E402  (names C functions that the import above loads)

for _name, _function in ((kernels.IMDECODE, ctypes_imdecode), (kernels.RESIZE, ctypes_resize)):
    llvmlite.binding.add_symbol(_name, ctypes.cast(_function, ctypes.c_void_p).value)

_AHEAD = 3  # batches that FFCV's thread prepares in advance; its ring has two slots more
_POLL_SECONDS = 0.2  # how soon a waiting side notices that the other one is gone


def _threads(lanes: int) -> int:
    """numba refuses more threads than it started with; the lanes beyond wait for their turn."""
    return min(lanes, int(numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


class _CropDecoder(SimpleRGBImageDecoder):  # type: ignore[misc]
    """Decode, cut the given boxes, resize, flip; write a status per sample."""

    def __init__(self, size: int, lanes: int) -> None:
        super().__init__()
        self._size, self._lanes = size, lanes

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, AllocationQuery]:
        shape, dtype = (self._size, self._size, 3), np.dtype("u1")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=dtype)
        return state, AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Any]:
        kernel, lanes = kernels.decode_crops, self._lanes

        def decode_batch(indices, destination, _metadata, storage_state):  # type: ignore[no-untyped-def]
            kernel(indices, destination, storage_state, lanes)
            return destination[: len(indices)]

        return decode_batch


class _Tables(MemoryManager, MemoryContext):  # type: ignore[misc]
    """The beton's tables, and the boxes and statuses of the batch being decoded.

    Manager and context in one, as FFCV's own pair for a memory-mapped file shares one context.
    Written by the loader's thread only, which decodes one batch at a time.
    """

    def __init__(self, beton: Beton, spec: LoaderSpec, lanes: int) -> None:
        self._beton, self._spec = beton, spec
        self._batches: Sequence[Int64] = ()
        self._epoch = 0
        self.boxes = np.zeros((spec.batch_size, 5), np.int32)
        self.status = np.zeros(spec.batch_size, np.uint8)
        largest = int((beton.heights.astype(np.int64) * beton.widths).max())
        patch = patch_side(spec.crop, beton.heights, beton.widths)
        self.state_arrays = (
            beton.data,
            beton.offsets,
            beton.sizes,
            beton.heights,
            beton.widths,
            beton.modes,
            self.boxes,
            self.status,
            np.empty((lanes, largest * 3), np.uint8),
            np.empty((lanes, patch * patch * 3), np.uint8),
        )

    def begin(self, epoch: int) -> None:
        self._epoch = epoch

    def schedule_epoch(self, batches: Sequence[Int64]) -> _Tables:
        self._batches = batches
        return self

    @property
    def state(self) -> tuple[Any, ...]:
        return self.state_arrays

    def start_batch(self, batch: int) -> None:
        indices = self._batches[batch]
        self.boxes[:] = boxes(
            self._spec,
            epoch=self._epoch,
            indices=indices,
            heights=self._beton.heights[indices],
            widths=self._beton.widths[indices],
        )

    def __enter__(self) -> _Tables:
        return self

    def __exit__(self, *_exc: object) -> None:
        """Nothing to release: the beton owns its map."""

    def compile_reader(self, _address: object = None, _size: object = None) -> None:
        """Unused: the kernel reads the map itself."""

    @property
    def state_type(self) -> Any:
        typeof: Callable[[object], Any] = numba.typeof
        return typeof(self.state_arrays)


class _EpochIterator(StockEpochIterator):  # type: ignore[misc]
    """FFCV's background thread, with errors handed over, a clock, and an end."""

    def __init__(self, loader: _Loader, order: Int64, timeout: float) -> None:
        self._timeout = timeout
        self._failure: BaseException | None = None
        self._served = 0
        super().__init__(loader, order)

    def run(self) -> None:
        try:
            numba.set_num_threads(_threads(self.loader.num_workers))
            slots = self.loader.batches_ahead + 2
            for number, indices in enumerate(self.iter_ixes):
                slot = number % slots
                (images,) = self.run_pipeline(number, indices, slot, None)
                context = self.memory_context
                item = (images, context.boxes.copy(), context.status.copy())
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            self._failure = error

    def run_pipeline(
        self, b_ix: int, batch_indices: Int64, batch_slot: int, _event: object
    ) -> tuple[Any, ...]:
        """As stock, but outside CUDA streams: nothing of ours runs on a GPU here, and entering a
        stream from this thread, whose device is 0, makes every rank allocate on GPU 0."""
        self.memory_context.start_batch(b_ix)
        args = {
            "batch_indices": batch_indices,
            "storage_state": self.storage_state,
            "metadata": self.metadata,
        }
        for kind, prefix in (("operation", "memory_"), ("shared", "shared_memory_")):
            for node, buffer in self.memory_allocations[kind].items():
                args[prefix + str(node)] = select_buffer(buffer, batch_slot, len(batch_indices))
        code, outputs = self.loader.code
        for stage, defined in code:
            for node, result in zip(defined, stage(**args), strict=True):
                args[f"result_{node}"] = result
        return tuple(args[f"result_{node}"] for node in outputs)

    def _put(self, item: object) -> bool:
        """Queue an item unless the consumer has gone."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> Any:
        limit = self._timeout * (2 if self._served == 0 else 1)  # the first batch compiles
        deadline = time.monotonic() + limit
        while True:
            # Read before the queue: a thread that fails after this is seen on the next round.
            alive = self.is_alive()
            try:
                item = self.output_queue.get(timeout=_POLL_SECONDS if alive else 0)
                break
            except queue.Empty:
                if self._failure is not None:
                    raise self._failure from None
                if not alive:
                    raise RuntimeError("FFCV's loader thread ended without an error") from None
                if time.monotonic() > deadline:
                    self._timeout = _POLL_SECONDS  # it is stuck: closing waits no longer
                    raise TimeoutError(
                        f"no batch from FFCV's loader thread for {limit:.0f} s"
                    ) from None
        if item is None:
            self.close()
            raise StopIteration
        self._served += 1
        return item

    def close(self) -> None:
        """End the thread and wait for it; the ring of buffers goes with the iterator."""
        self.terminate_event.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=self._timeout)


class _Loader(StockLoader):  # type: ignore[misc]
    """FFCV's loader over arrays: no order, no labels and no dictionaries of its own."""

    def __init__(self, beton: Beton, spec: LoaderSpec, lanes: int) -> None:
        # Not calling the stock initialiser is the point: it builds sets and dictionaries with one
        # entry per sample, and draws an order that we do not use.
        self.batch_size, self.batches_ahead = spec.batch_size, _AHEAD
        self.num_workers = lanes
        self.memory_manager = self.tables = _Tables(beton, spec, lanes)
        self.reader = self
        self.metadata = {"f0": np.zeros(1, np.uint8)}  # the kernel reads the tables instead
        self.traversal_order = None
        specs = {"image": PipelineSpec("image", _CropDecoder(spec.crop.size, lanes))}
        fields = {"image": RGBImageField()}
        with torch_threads_kept():
            Compiler.set_num_threads(_threads(lanes))
            self.graph = Graph(specs, fields, {"image": 0}, self.metadata, None)
            # The kernel is compiled already, and kept on disk; FFCV would compile what calls it
            # again for every loader, six seconds each time.
            Compiler.set_enabled(False)
            try:
                self.generate_code()
            finally:
                Compiler.set_enabled(True)

    def iterate(self, order: Int64, *, epoch: int, timeout: float) -> _EpochIterator:
        """Start decoding the samples of `order`, int64 (steps * B,)."""
        self.tables.begin(epoch)
        with torch_threads_kept():
            return _EpochIterator(self, order, timeout)


class FfcvSource:
    """Decoded crops of a beton, by FFCV."""

    def __init__(self, beton: Beton, spec: LoaderSpec, *, shard: Shard, workers: int) -> None:
        self._beton, self._spec = beton, spec
        self._order = Order(len(beton), spec, shard)
        self._loader = _Loader(beton, spec, workers)
        self._running: _EpochIterator | None = None
        self.bad = BadSamples(spec.max_bad)

    def __len__(self) -> int:
        return self._order.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        """As `pipelines.loader.Source.epoch`."""
        indices, valid = self._order.batches(epoch, start_step)
        if len(indices) == 0:
            return
        # One epoch at a time: the boxes of the batch in work belong to the loader.
        if self._running is not None:
            self._running.close()
            if self._running.is_alive():
                raise RuntimeError("FFCV's loader thread of an earlier epoch is stuck")
        self.bad.start_epoch()
        running = self._loader.iterate(indices.reshape(-1), epoch=epoch, timeout=self._spec.timeout)
        self._running = running
        try:
            for step, (images, boxes_, status) in enumerate(running):
                pixels = torch.from_numpy(images)
                ok = valid[step].copy()
                for i in np.flatnonzero(ok & (status != kernels.OK)):
                    ok[i] = self._second_opinion(int(indices[step, i]), boxes_[i], pixels[i])
                yield RawBatch(
                    pixels,
                    torch.from_numpy(self._beton.labels[indices[step]]),
                    torch.from_numpy(indices[step]),
                    torch.from_numpy(ok),
                    torch.from_numpy(boxes_),
                )
        finally:
            running.close()

    def close(self) -> None:
        """End the decoding thread and release the file."""
        if self._running is not None:
            self._running.close()
        data_sets.close(self._beton)

    def _second_opinion(self, sample: int, box: Any, pixels: torch.Tensor) -> bool:
        """Decode a refused sample with torchvision: FFCV's code also stands for mere warnings."""
        try:
            picture = decode(self._beton.payload(sample))
        except ImageError as error:
            self.bad.report(data_sets.name(self._beton, sample), str(error))
            return False
        pixels.copy_(crop(picture, box, self._spec.crop.size).permute(1, 2, 0))
        return True
