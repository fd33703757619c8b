"""The loader: batches of any engine, rotated and normalised on the device.

An engine is a `Source` of decoded crops. `Loader` moves them to the device, rotates and normalises
them, and yields batches that the consumer owns.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator

import torch
from torch.profiler import record_function

from pipelines.arrays import Int64
from pipelines.batch import DTYPES, IGNORE, Batch, RawBatch
from pipelines.checks import check
from pipelines.device.color_jitter import draw_jitter, jitter_views
from pipelines.device.host_memory import BufferPool
from pipelines.device.rotate import normalize_views, rotate4
from pipelines.device.transfer import Transfer
from pipelines.engines.choice import open_engine
from pipelines.engines.source import Source
from pipelines.engines.synthetic import CLASSES
from pipelines.samples import Samples
from pipelines.sampling.random_bits import digest64
from pipelines.spec import LoaderSpec, Precision, Shard


class Loader:
    """Yields batches on the device, ready for the network."""

    def __init__(
        self,
        source: Source,
        spec: LoaderSpec,
        samples: Samples | None = None,
        *,
        engine: str,
        device: torch.device,
        precision: Precision = "fp32",
    ) -> None:
        """Use `open_loader`. `samples` is the data set that `source` reads, None if synthetic."""
        self.spec, self.engine, self.device = spec, engine, device
        self.classes = () if samples is None else samples.classes
        """Class names; empty if the data set has none."""
        self.data_id = "" if samples is None else samples.fingerprint
        """Short hash that identifies the data set; empty for synthetic images."""
        self.label_range = (0, CLASSES - 1)
        """Smallest and largest label of the data set; -1 means no label."""
        if samples is not None:
            self.label_range = int(samples.labels.min()), int(samples.labels.max())
        self.total = spec.samples if samples is None else len(samples.labels)
        """Samples of the data set, before `max_samples` and `samples_per_class`."""
        self.wait_seconds = 0.0
        """Seconds spent waiting for decoded crops, summed over all epochs."""
        self.digest = 0
        """Sum of `digest64` over all batches so far, modulo 2**64. Valid samples only."""
        self.source = source
        """The engine: crops before transfer and rotation, and the count of undecodable samples."""
        self._transfer = Transfer(device)
        self._dtype = DTYPES[precision]
        self._buffers = BufferPool()

    def __len__(self) -> int:
        """Steps per epoch, the same on every rank."""
        return len(self.source)

    def epoch(self, epoch: int, *, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of an epoch.

        Args:
            epoch: Counted from 0. With the spec's seed it decides order, crops and flips.
            start_step: Number of steps to skip. Their samples are not read.

        Raises:
            ImageError: More samples are undecodable than the spec allows.
            TimeoutError: The engine yielded no batch within the spec's timeout.
        """
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(contextlib.closing(self.source.epoch(epoch, start_step)))
            # Before closing: the last copy may still read memory that closing frees.
            stack.callback(self._transfer.wait)
            while True:
                with record_function("device"):
                    self._transfer.wait()
                begin = time.perf_counter()
                with record_function("data wait"):
                    raw = self._transfer.fetch(source)
                self.wait_seconds += time.perf_counter() - begin
                if raw is None:
                    return
                keep = raw.valid.numpy()
                batch_digest = digest64(epoch, raw.indices.numpy()[keep], raw.boxes.numpy()[keep])
                self.digest = (self.digest + batch_digest) % 2**64
                with record_function("rotate"):
                    batch = self._finish(self._transfer.copy(raw), epoch, raw.indices.numpy())
                self._transfer.release()
                yield batch

    def close(self) -> None:
        """Release the threads, buffers and files of the engine."""
        with contextlib.closing(self.source):
            self._transfer.wait()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _finish(self, raw: RawBatch, epoch: int, indices: Int64) -> Batch:
        spec, normalize, dtype = self.spec, self.spec.normalize, self._dtype
        valid, targets, out = raw.valid.repeat(spec.view_count), raw.labels, None
        if self.device.type == "cpu" and not spec.color_jitter.active:
            out = self._buffers.images(len(valid), spec.side(epoch), dtype)
        if spec.views == "rotate4":
            images, targets = rotate4(raw.images, normalize=normalize, dtype=dtype, out=out)
        elif spec.color_jitter.active:
            jitter = draw_jitter(spec.color_jitter, seed=spec.seed, epoch=epoch, indices=indices)
            images = jitter_views(raw.images, jitter, normalize=normalize, dtype=dtype)
        else:
            images = normalize_views(raw.images, views=1, normalize=normalize, dtype=dtype, out=out)
        targets = torch.where(valid, targets, IGNORE)
        return Batch(images, targets, valid, raw.labels, raw.indices)


def open_loader(
    spec: LoaderSpec,
    *,
    shard: Shard | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
) -> Loader:
    """Open a data set with the engine that suits it.

    Args:
        spec: Data set, engine and options.
        shard: The part of each global batch to load. None: all of it.
        device: Device of the batches.
        precision: Type of the emitted images.

    Raises:
        FileNotFoundError: The data does not exist.
        ValueError: An argument is no choice, or the engine cannot read the data, is not installed,
            or ignores an option.
    """
    check("spec", spec, LoaderSpec)
    check("precision", precision, Precision)
    device = torch.device(device)
    engine, source, samples = open_engine(spec, shard, device)
    return Loader(source, spec, samples, engine=engine, device=device, precision=precision)
