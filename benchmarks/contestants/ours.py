"""Contestant: rotpred's own loader."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Literal

import numpy as np
import torch

from contestants.base import DeliveredCrop, LoaderContestant, boxes_of, unnormalized
from harness.timing import synchronize
from pipelines.batch import RawBatch
from pipelines.engines.choice import choose_engine
from pipelines.loader import Loader, open_loader
from pipelines.samples import open_samples
from pipelines.sampling.random_bits import digest64
from pipelines.spec import Engine, Precision

GAP_BATCHES, GAP_EPOCHS = 8, 4
HASHED_BATCHES = 2


class OurLoader(LoaderContestant):
    """`open_loader`: crops as the engine delivers them, or views on the device."""

    def __init__(
        self,
        *,
        engine: Engine,
        output: Literal["crops", "rotate4", "plain"],
        precision: Precision = "fp32",
        device: str = "cpu",
        data: str,
        size: int,
        batch_size: int,
        workers: int,
    ) -> None:
        super().__init__(data=data, size=size, batch_size=batch_size, workers=workers)
        self.device, self.output, self.precision = torch.device(device), output, precision
        views = "plain" if output == "plain" else "rotate4"
        self.spec = replace(self.spec, engine=engine, views=views, workers=workers)
        choose_engine(self.spec)  # Imports only this engine, because memory is measured.

    def open(self) -> None:
        self.loader = self._open()

    def _open(self, max_samples: int | None = None) -> Loader:
        spec = self.spec if max_samples is None else replace(self.spec, max_samples=max_samples)
        return open_loader(spec, device=self.device, precision=self.precision)

    def batches(self, epoch: int) -> Generator[int, None, None]:
        if self.output == "crops":
            # The engine alone: decoding is compared, not the making of views.
            yield from (len(raw.indices) for raw in _crops(self.loader, epoch))
        else:
            with closing(self.loader.epoch(epoch)) as batches:
                yield from (len(batch.indices) for batch in batches)

    def delivered_crops(self) -> Iterator[DeliveredCrop]:
        samples = open_samples(self.data)
        if self.output == "crops":
            for raw in _crops(self.loader, 0):
                images = np.asarray(raw.images)
                for row, i in enumerate(raw.indices.tolist()):
                    box = tuple(raw.boxes[row].tolist())
                    yield DeliveredCrop(bytes(samples.read(i)), box, images[row])
            return
        crop_boxes = boxes_of(self.spec, samples, epoch=0)
        with closing(self.loader.epoch(0)) as batches:
            for batch in batches:
                pixels = unnormalized(batch.images[: len(batch.indices)], self.spec)
                for row, i in enumerate(batch.indices.tolist()):
                    yield DeliveredCrop(
                        bytes(samples.read(i)), tuple(crop_boxes[i].tolist()), pixels[row]
                    )

    def crop_digest(self) -> dict[str, str]:
        """Return a hash of the first batches' samples and crop boxes; engines must agree on it."""
        raws = islice(_crops(self.loader, 0), HASHED_BATCHES)
        hashes = [digest64(0, raw.indices.numpy(), raw.boxes.numpy()) for raw in raws]
        return {"digest": f"{sum(hashes) % 2**64:016x}"}

    def epoch_gap(self) -> dict[str, float]:
        """Return the median seconds between two epochs (last batch to first), and per batch."""
        gaps, steps = [], []
        with self._open(GAP_BATCHES * self.batch_size) as loader:
            last = 0.0
            for epoch in range(GAP_EPOCHS):
                for step, _ in enumerate(loader.epoch(epoch)):
                    synchronize(self.device)
                    now = time.perf_counter()
                    if epoch:
                        (steps if step else gaps).append(now - last)
                    last = now
        return {
            "epoch_gap_seconds": round(median(gaps), 4),
            "batch_seconds": round(median(steps), 4) if steps else 0.0,
        }

    def close(self) -> None:
        self.loader.close()


def _crops(loader: Loader, epoch: int) -> Generator[RawBatch, None, None]:
    with closing(loader.source.epoch(epoch)) as source:  # type: ignore[type-var]
        yield from source
