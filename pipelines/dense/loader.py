"""Batches for detection and segmentation.

Threads decode, resize and crop, each image as soon as a thread is free; uint8 goes to the device,
which normalises. Batches are begun before they are asked for, in training across epochs.
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
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import record_function

from pipelines.arrays import Int64
from pipelines.batch import DTYPES
from pipelines.datasets.annotations import IGNORED, DenseSamples
from pipelines.dense import transforms
from pipelines.dense.batch import DenseBatch, Target
from pipelines.dense.order import EndlessOrder, Places, SinglePassOrder, by_shape
from pipelines.dense.samples import (
    LoadedSample,
    SampleSlot,
    load_sample,
    open_dense_samples,
    trained_on,
)
from pipelines.dense.spec import DenseSpec, RatioCrop
from pipelines.dense.transforms import ResizePlan
from pipelines.native.threads import DaemonWorker
from pipelines.sampling.random_bits import digest64
from pipelines.spec import Precision, Shard

log = logging.getLogger(__name__)

_AHEAD = 2  # batches in work beside the one that is due
_PATIENCE = 5.0  # seconds in which threads must end


class _Work(NamedTuple):
    """A batch that the threads have been given."""

    places: Places
    plans: list[ResizePlan]
    images: torch.Tensor
    """uint8 (B, H, W, 3)."""
    masks: torch.Tensor | None
    """uint8 (B, H, W)."""
    futures: list[Future[LoadedSample]]


class DenseLoader:
    """Batches of one data set on the device. Contract: see rotpred.training.loader_interface.Feed."""

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
            chosen = trained_on(samples, spec)
            one_size = isinstance(spec.geometry, RatioCrop)
            groups = (chosen,) if one_size else _at(chosen, by_shape(samples.sizes[chosen]))
            self._order = EndlessOrder(groups, spec.batch_size, shard, spec.seed)
            self._steps = spec.steps_per_epoch or max(
                len(chosen) // (spec.batch_size * shard.world), 1
            )
        else:
            self._order = SinglePassOrder(len(samples), spec.batch_size, shard)
            self._steps = self._order.steps
        self._next = 0
        self._begun: deque[_Work] = deque()
        self._runners = _runners(
            spec.workers or max(len(os.sched_getaffinity(0)) // shard.local_world, 1)
        )
        self._turns = itertools.cycle(self._runners)

    def __len__(self) -> int:
        """Steps per epoch, the same on every rank."""
        return self._steps

    def epoch(self, epoch: int, *, start_step: int = 0) -> Generator[DenseBatch, None, None]:
        """The batches of an epoch, from a step on: a pure function of both, and of the spec.

        Raises:
            ImageError: an image or mask is damaged, or of another size than its data set says.
            TimeoutError: no batch within the spec's timeout.
        """
        if not 0 <= start_step <= len(self):
            raise ValueError(f"start_step {start_step} is not in an epoch of {len(self)} steps")
        first = epoch * len(self) if self.spec.train else 0
        for step in range(first + start_step, first + len(self)):
            if self._next != step:
                self._drop()
                self._next = step
            while len(self._begun) <= _AHEAD:
                following = step + len(self._begun)
                if not self.spec.train and following >= len(self):
                    break
                self._begun.append(self._begin(self._order.at(following)))
            work = self._begun.popleft()
            self._next += 1
            begin = time.perf_counter()
            with record_function("data wait"):
                made = self._wait(work)
            self.wait_seconds += time.perf_counter() - begin
            self._count(work, made)
            with record_function("device"):
                batch = self._batch(work, made)
            yield batch

    def close(self) -> None:
        """End the threads; one that is stuck ends with the process."""
        self._drop()
        end = time.monotonic() + _PATIENCE
        ended = [runner.close(max(end - time.monotonic(), 0)) for runner in self._runners]
        self._runners = []
        if not all(ended):
            log.warning("%d loading threads are stuck and left behind", ended.count(False))

    def __enter__(self) -> DenseLoader:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _drop(self) -> None:
        """Forget what the threads were given."""
        for work in self._begun:
            for future in work.futures:
                future.cancel()
        self._begun.clear()

    def _begin(self, places: Places) -> _Work:
        """Give a batch to the threads."""
        if not self._runners:
            raise RuntimeError("the loader is closed")
        spec, pin = self.spec, self._device.type == "cuda"
        draws = transforms.draws(spec, places.passes, places.indices)
        plans = [
            transforms.place(spec, draw, *map(int, self.samples.sizes[i]))
            for i, draw in zip(places.indices, draws, strict=True)
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
        work = _Work(places, plans, images, masks, [])
        for row in range(len(plans)):
            runner = next(self._turns)
            room = SampleSlot(images[row], None if masks is None else masks[row])
            job = partial(
                load_sample,
                self.samples,
                spec,
                int(places.indices[row]),
                plans[row],
                draws[row],
                room,
            )
            work.futures.append(runner.submit(job))
        return work

    def _wait(self, work: _Work) -> list[LoadedSample]:
        """What the threads made of a batch."""
        end = time.monotonic() + self.spec.timeout
        made = []
        for i, future in zip(work.places.indices, work.futures, strict=True):
            try:
                made.append(future.result(max(end - time.monotonic(), 0)))
            except TimeoutError as error:
                if future.done():  # the image's own error
                    raise
                raise TimeoutError(
                    f"{self.samples.path(int(i))}: not loaded within {self.spec.timeout:g} s"
                ) from error
        return made

    def _count(self, work: _Work, made: Sequence[LoadedSample]) -> None:
        indices, passes, valid = work.places
        rows = [
            (number, plan.height, plan.width, plan.flip, *one.corner)
            for number, plan, one in zip(passes, work.plans, made, strict=True)
        ]
        served = digest64(0, indices[valid], np.array(rows, np.int32)[valid])
        self.digest = (self.digest + served) % (1 << 64)

    def _batch(self, work: _Work, made: Sequence[LoadedSample]) -> DenseBatch:
        """Normalise on the device."""
        indices, _, valid = work.places
        x = self._move(work.images).permute(0, 3, 1, 2).float()  # channels_last, as NHWC memory is
        x.sub_(self._mean).mul_(self._scale)
        for row, (height, width) in zip(x, (one.size for one in made), strict=True):
            row[:, height:], row[:, :, width:] = 0, 0
        return DenseBatch(
            x.to(self._dtype),
            torch.tensor([one.size for one in made]),
            torch.from_numpy(self.samples.sizes[indices]),
            torch.from_numpy(indices),
            torch.from_numpy(valid),
            [self._target(one.target) for one in made if one.target is not None],
            None if work.masks is None else self._move(work.masks).long(),
        )

    def _target(self, target: Target) -> Target:
        moved = Target(boxes=self._move(target["boxes"]), labels=self._move(target["labels"]))
        if "masks" in target:
            moved["masks"] = self._move(target["masks"])
        return moved

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

    Raises:
        FileNotFoundError: a folder, list or file is missing.
        ValueError: the spec, a list or an annotation is wrong; in words, with file and line.
    """
    return DenseLoader(
        open_dense_samples(spec),
        spec,
        shard=shard or Shard(),
        device=torch.device(device),
        precision=precision,
    )


def _at(chosen: Int64, groups: Sequence[Int64]) -> tuple[Int64, ...]:
    return tuple(chosen[group] for group in groups)


def _runners(count: int) -> list[DaemonWorker]:
    """Threads in which torch uses one core each: a team for each of ours would be count squared."""
    runners, cores = [DaemonWorker(f"dense-{i}") for i in range(count)], torch.get_num_threads()
    try:
        for ready in [runner.submit(_one_core) for runner in runners]:
            ready.result(_PATIENCE)
    finally:
        torch.set_num_threads(cores)  # the number for threads to come; each of those keeps its own
    return runners


def _one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # from now on this thread has its number
