"""The only loader class: what every protocol needs alike, whichever engine decodes.

An engine is a `Source`. `Loader` moves its crops to the device, turns and normalises them, and
yields batches that belong to the consumer.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator

import torch
from torch.profiler import record_function

from pipelines.arrays import Int64
from pipelines.batch import DTYPES, IGNORE, Batch, RawBatch
from pipelines.beton.reader import Beton
from pipelines.device.color_jitter import draw_jitter, jitter_views
from pipelines.device.host_memory import BufferPool
from pipelines.device.rotate import normalize_views, rotate4
from pipelines.device.transfer import Transfer
from pipelines.engines.choice import _open_source, choose_engine
from pipelines.engines.samples import RAW, fingerprint, open_samples
from pipelines.engines.source import Source
from pipelines.sampling.random_bits import digest64
from pipelines.spec import LoaderSpec, Precision, Shard, check_options

log = logging.getLogger(__name__)


class Loader:
    """Batches on the device, ready for the network."""

    def __init__(
        self,
        source: Source,
        spec: LoaderSpec,
        *,
        engine: str,
        device: torch.device,
        precision: Precision = "fp32",
        classes: tuple[str, ...] = (),
        data_id: str = "",
        label_range: tuple[int, int] = (-1, -1),
        total: int = 0,
    ) -> None:
        self.spec, self.engine, self.device = spec, engine, device
        self.classes = classes
        """Class names, empty where the data set has none."""
        self.data_id = data_id
        """Short hash that identifies the data set."""
        self.label_range = label_range
        """Smallest and largest label of the data set; -1 stands for none."""
        self.total = total
        """Samples of the data set, before the spec chooses some."""
        self.wait_seconds = 0.0
        """Time that consumers have spent waiting for decoded crops, over all epochs."""
        self.digest = 0
        """Sum over all valid samples served of the hash of (epoch, index, box), modulo 2**64."""
        self.source = source
        """Who decodes: its epochs are the crops before transfer and rotation."""
        self._transfer = Transfer(device)
        self._dtype = DTYPES[precision]
        self._recycler = BufferPool()

    def __len__(self) -> int:
        """Steps per epoch, the same on every rank."""
        return len(self.source)

    @property
    def bad(self) -> int:
        """Undecodable samples masked so far."""
        return self.source.bad.total

    def epoch(self, epoch: int, *, start_step: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch, from a step on.

        Args:
            epoch: counted from 0; with the spec's seed it decides order, crops and flips.
            start_step: steps to skip, without reading them.

        Raises:
            ImageError: more undecodable samples than the spec allows.
            TimeoutError: the engine gave no batch within the spec's timeout.
        """
        source = self.source.epoch(epoch, start_step)
        try:
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
                served = digest64(epoch, raw.indices.numpy()[keep], raw.boxes.numpy()[keep])
                self.digest = (self.digest + served) % 2**64
                with record_function("rotate"):
                    batch = self._finish(self._transfer.copy(raw), epoch, raw.indices.numpy())
                self._transfer.release()
                yield batch
        finally:
            try:
                self._transfer.wait()  # The last copy may still read what closing frees.
            finally:
                if isinstance(source, Generator):
                    source.close()

    def close(self) -> None:
        """Release the engine's threads, buffers and files."""
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
            out = self._recycler.images(len(valid), spec.side(epoch), dtype)
        if spec.views == "rotate4":
            images, targets = rotate4(raw.images, normalize=normalize, dtype=dtype, out=out)
        elif spec.color_jitter.active:
            tints = draw_jitter(spec.color_jitter, seed=spec.seed, epoch=epoch, indices=indices)
            images = jitter_views(raw.images, tints, normalize=normalize, dtype=dtype)
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
    """Open the data set that a spec names, with the engine that it names.

    Args:
        spec: what to load and how.
        shard: which part of each global batch; the whole of it by default.
        device: where batches go.
        precision: type of the emitted images.

    Raises:
        FileNotFoundError: there is no such data.
        ValueError: the data, the engine and the options do not fit together, in words.
    """
    shard = shard if shard is not None else Shard()
    device = torch.device(device)
    # A beton opens in no time, a folder of a million files does not: refuse what cannot be first.
    samples = None
    if spec.engine != "synthetic" and spec.data.endswith(".beton"):
        samples = open_samples(spec.data, spec.root)
    raw = isinstance(samples, Beton) and bool((samples.modes == RAW).any())
    engine = choose_engine(spec, raw=raw)
    check_options(spec, engine, on_gpu=device.type == "cuda")
    if engine == "synthetic":
        from pipelines.engines.synthetic import CLASSES, SyntheticSource

        source: Source = SyntheticSource(spec, shard=shard, device=device)
        return Loader(
            source,
            spec,
            engine=engine,
            device=device,
            precision=precision,
            label_range=(0, CLASSES - 1),
            total=spec.samples,
        )
    samples = samples or open_samples(spec.data, spec.root)
    source = _open_source(engine, samples, spec, shard, device)
    return Loader(
        source,
        spec,
        engine=engine,
        device=device,
        precision=precision,
        classes=samples.classes,
        data_id=fingerprint(samples),
        label_range=(int(samples.labels.min()), int(samples.labels.max())),
        total=len(samples.labels),
    )
