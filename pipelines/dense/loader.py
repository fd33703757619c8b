"""Data loader for detection and segmentation.

Threads decode, resize and crop single images. The device receives uint8 and normalises it. Batches
are loaded ahead; in training also across epochs.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
from torch.profiler import record_function

from pipelines.batch import DTYPES
from pipelines.checks import check
from pipelines.datasets.annotations import IGNORED, DenseSamples
from pipelines.dense import transforms
from pipelines.dense.batch import DenseBatch, Target
from pipelines.dense.order import BatchIndices, EndlessOrder, SinglePassOrder, by_shape
from pipelines.dense.samples import (
    LoadedSample,
    SampleSlot,
    load_sample,
    open_dense_samples,
    training_indices,
)
from pipelines.dense.spec import DenseSpec, RatioCrop
from pipelines.dense.transforms import ResizePlan
from pipelines.native.threads import DaemonWorker
from pipelines.sampling.random_bits import digest64
from pipelines.spec import Precision, Shard

log = logging.getLogger(__name__)

_AHEAD = 2  # batches loaded ahead of the next one to yield
_CLOSE_TIMEOUT_SECONDS = 5.0  # seconds to wait for threads to end


class _PendingBatch(NamedTuple):
    """A batch submitted to the threads."""

    rows: BatchIndices
    plans: list[ResizePlan]
    images: torch.Tensor
    """uint8 (B, H, W, 3)."""
    masks: torch.Tensor | None
    """uint8 (B, H, W)."""
    futures: list[Future[LoadedSample]]


class DenseLoader:
    """Loader of batches on the device, of images of variable size with boxes or masks.

    Implements `rotpred.training.loader_interface.TrainingLoader`.
    """

    engine = "dense"

    def __init__(
        self,
        samples: DenseSamples,
        spec: DenseSpec,
        *,
        shard: Shard,
        device: torch.device,
        precision: Precision,
    ) -> None:
        if isinstance(spec.geometry, RatioCrop) and (samples.kind != "masks" or not spec.train):
            raise ValueError(f"{spec.data}: RatioCrop is for training on masks only")
        self.spec, self.samples = spec, samples
        self.classes, self.data_id = samples.classes, samples.data_id
        self.wait_seconds, self.digest = 0.0, 0
        self._device, self._dtype = device, DTYPES[precision]
        self._mean = torch.tensor(spec.normalize.mean, device=device).view(1, 3, 1, 1)
        self._scale = 1 / torch.tensor(spec.normalize.std, device=device).view(1, 3, 1, 1)
        self._order: EndlessOrder | SinglePassOrder
        if spec.train:
            chosen = training_indices(samples, spec)
            groups = [chosen]  # All crops have one shape.
            if not isinstance(spec.geometry, RatioCrop):
                groups = [chosen[group] for group in by_shape(samples.sizes[chosen])]
            self._order = EndlessOrder(tuple(groups), spec.batch_size, shard, spec.seed)
            self._steps = spec.steps_per_epoch or max(
                len(chosen) // (spec.batch_size * shard.world), 1
            )
        else:
            self._order = SinglePassOrder(len(samples), spec.batch_size, shard)
            self._steps = self._order.steps
        self._next = 0
        self._pending: deque[_PendingBatch] = deque()
        self._workers = _workers(
            spec.workers or max(len(os.sched_getaffinity(0)) // shard.local_world, 1)
        )
        self._turns = itertools.cycle(self._workers)

    def __len__(self) -> int:
        """Steps per epoch, the same on every rank."""
        return self._steps

    def epoch(self, epoch: int, *, start_step: int = 0) -> Generator[DenseBatch, None, None]:
        """Yield the batches of an epoch, starting at a step: a pure function of both and the spec.

        Args:
            epoch: Counted from 0.
            start_step: Number of steps to skip. Their images are not read.

        Raises:
            ImageError: An image or mask is damaged, or its size differs from its annotation.
            TimeoutError: There was no batch within the spec's timeout.
            ValueError: `start_step` is not in the epoch.
        """
        if not 0 <= start_step <= len(self):
            raise ValueError(f"start_step {start_step} is not in an epoch of {len(self)} steps")
        first = epoch * len(self) if self.spec.train else 0
        for step in range(first + start_step, first + len(self)):
            if self._next != step:
                self._cancel()
                self._next = step
            while len(self._pending) <= _AHEAD:
                following = step + len(self._pending)
                if not self.spec.train and following >= len(self):
                    break
                self._pending.append(self._submit(self._order.at(following)))
            work = self._pending.popleft()
            self._next += 1
            begin = time.perf_counter()
            with record_function("data wait"):
                loaded = self._wait(work)
            self.wait_seconds += time.perf_counter() - begin
            self._count(work, loaded)
            with record_function("device"):
                batch = self._batch(work, loaded)
            yield batch

    def close(self) -> None:
        """End the threads. A stuck thread ends with the process."""
        self._cancel()
        end = time.monotonic() + _CLOSE_TIMEOUT_SECONDS
        ended = [worker.close(max(end - time.monotonic(), 0)) for worker in self._workers]
        self._workers = []
        if not all(ended):
            log.warning("%d loading threads are stuck and were abandoned", ended.count(False))

    def __enter__(self) -> DenseLoader:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _cancel(self) -> None:
        """Cancel all submitted batches."""
        for work in self._pending:
            for future in work.futures:
                future.cancel()
        self._pending.clear()

    def _submit(self, rows: BatchIndices) -> _PendingBatch:
        """Submit a batch to the threads."""
        if not self._workers:
            raise RuntimeError("the loader is closed")
        spec, pin = self.spec, self._device.type == "cuda"
        draws = transforms.draw_uniforms(spec, rows.passes, rows.indices)
        plans = [
            transforms.plan_resize(spec, draw, *map(int, self.samples.sizes[i]))
            for i, draw in zip(rows.indices, draws, strict=True)
        ]
        sizes = [plan.size for plan in plans]
        if isinstance(spec.geometry, RatioCrop):
            sizes = [(spec.geometry.size, spec.geometry.size)]
        height, width = (
            -(-max(side) // spec.divisor) * spec.divisor for side in zip(*sizes, strict=True)
        )
        shape = (len(plans), height, width)
        images = torch.empty((*shape, 3), dtype=torch.uint8, pin_memory=pin)
        masks = None
        if spec.train and self.samples.kind == "masks":
            masks = torch.full(shape, IGNORED, dtype=torch.uint8, pin_memory=pin)
        work = _PendingBatch(rows, plans, images, masks, [])
        for row in range(len(plans)):
            worker = next(self._turns)
            slot = SampleSlot(images[row], None if masks is None else masks[row])
            i, plan = int(rows.indices[row]), plans[row]
            job = partial(load_sample, self.samples, spec, i, plan, draws[row], slot)
            work.futures.append(worker.submit(job))
        return work

    def _wait(self, work: _PendingBatch) -> list[LoadedSample]:
        """Wait for a batch; returns one result per image."""
        end = time.monotonic() + self.spec.timeout
        loaded = []
        for i, future in zip(work.rows.indices, work.futures, strict=True):
            try:
                loaded.append(future.result(max(end - time.monotonic(), 0)))
            except TimeoutError as error:
                if future.done():  # raised by loading the image itself
                    raise
                raise TimeoutError(
                    f"{self.samples.path(int(i))}: not loaded within {self.spec.timeout:g} s"
                ) from error
        return loaded

    def _count(self, work: _PendingBatch, loaded: Sequence[LoadedSample]) -> None:
        indices, passes, valid = work.rows
        boxes = [
            (number, plan.height, plan.width, plan.flip, *one.corner)
            for number, plan, one in zip(passes, work.plans, loaded, strict=True)
        ]
        batch_digest = digest64(0, indices[valid], np.array(boxes, np.int32)[valid])
        self.digest = (self.digest + batch_digest) % (1 << 64)

    def _batch(self, work: _PendingBatch, loaded: Sequence[LoadedSample]) -> DenseBatch:
        """Move a batch to the device and normalise it."""
        indices, _, valid = work.rows
        x = self._move(work.images).permute(0, 3, 1, 2).float()  # channels_last: the memory is NHWC
        x.sub_(self._mean).mul_(self._scale)
        for row, (height, width) in zip(x, (one.size for one in loaded), strict=True):
            row[:, height:], row[:, :, width:] = 0, 0
        return DenseBatch(
            x.to(self._dtype),
            torch.tensor([one.size for one in loaded]),
            torch.from_numpy(self.samples.sizes[indices]),
            torch.from_numpy(indices),
            torch.from_numpy(valid),
            [
                cast(Target, {key: self._move(x) for key, x in one.target.items()})
                for one in loaded
                if one.target is not None
            ],
            None if work.masks is None else self._move(work.masks).long(),
        )

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)


def open_dense(
    spec: DenseSpec,
    *,
    shard: Shard | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
) -> DenseLoader:
    """Open the data set that a spec names.

    Args:
        spec: Data set and options.
        shard: The part of each global batch to load. None: all of it.
        device: Device of the batches.
        precision: Type of the emitted images.

    Raises:
        FileNotFoundError: A folder, list or file does not exist.
        ValueError: An argument is no choice, or a list or an annotation is invalid: names file and
            line.
    """
    check("spec", spec, DenseSpec)
    check("precision", precision, Precision)
    return DenseLoader(
        open_dense_samples(spec),
        spec,
        shard=shard or Shard(),
        device=torch.device(device),
        precision=precision,
    )


def _workers(count: int) -> list[DaemonWorker]:
    """Start threads in which torch uses one core each. By default each would use all cores."""
    workers, cores = [DaemonWorker(f"dense-{i}") for i in range(count)], torch.get_num_threads()
    try:
        for ready in [worker.submit(_one_core) for worker in workers]:
            ready.result(_CLOSE_TIMEOUT_SECONDS)
    finally:
        torch.set_num_threads(cores)  # for other threads; the new ones keep their own number
    return workers


def _one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # fixes the number for this thread
