"""Contestant: time and memory to open a beton of many samples. One process measures once."""

from __future__ import annotations

import time

import numpy as np

from harness.timing import cpu_seconds, memory_mib
from pipelines.beton.reader import Beton
from pipelines.sampling.order import Order
from pipelines.spec import LoaderSpec, Shard


class OpenedBeton:
    """Opens one beton and computes an epoch's order, once. Only the page cache is warm.

    Each measurement needs a new process, because peak memory never decreases.
    """

    def __init__(self, *, data: str) -> None:
        self.data = data

    def measure(self, batch_size: int) -> dict[str, float]:
        """Return seconds to open and to compute one epoch's order, and memory in MiB.

        `added_mib` is the growth of peak memory above that of the imports.

        Raises:
            ValueError: A batch of the order repeats a sample.
        """
        before = memory_mib()["peak_rss_mib"]
        cpu, begin = cpu_seconds(), time.perf_counter()
        with Beton.open(self.data) as beton:
            opened = time.perf_counter() - begin
            spec = LoaderSpec(data=self.data, batch_size=batch_size)
            begin = time.perf_counter()
            order = Order(len(beton), spec, Shard())
            indices, _ = order.batches(1)
            ordered = time.perf_counter() - begin
            if len(np.unique(indices[:1])) != batch_size:
                raise ValueError("a batch of the order repeats a sample")
            after = memory_mib()
        return {
            "open_seconds": round(opened, 4),
            "order_seconds": round(ordered, 4),
            "cpu_seconds": round(cpu_seconds() - cpu, 4),
            "added_mib": round(after["peak_rss_mib"] - before, 1),
            **after,
        }

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
