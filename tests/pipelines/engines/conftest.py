"""Fixtures of the engine tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.loader import Loader, open_loader
from pipelines.spec import (
    LoaderSpec,
    RandomResizedCrop,
    Shard,
)
from tests.support.engines import PIXELS
from tests.support.images import COUNT


@pytest.fixture
def open_engine(folder: Path, beton: Path) -> Iterator[object]:
    """Open loaders over the shared data set; all are closed at the end of the test."""
    opened: list[Loader] = []

    def open_it(name: str, *, shard: Shard | None = None, **options: object) -> Loader:
        engine, _, data = name.partition("-")
        where = {"folder": str(folder), "beton": str(beton), "none": "synthetic"}
        defaults: dict[str, object] = {
            "data": where.get(data, data),
            "engine": engine,
            "batch_size": 5,
            "crop": RandomResizedCrop(24),
            "views": "plain",
            "normalize": PIXELS,
            "drop_last": False,
            "workers": 1,
            "samples": COUNT,
        }
        spec = LoaderSpec(**{**defaults, **options})  # type: ignore[arg-type]
        opened.append(open_loader(spec, shard=shard))
        return opened[-1]

    yield open_it
    for loader in opened:
        loader.close()
        loader.close()  # may be called twice
