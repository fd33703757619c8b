"""The tables of a beton: overlap checks against a test of every pair of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.sparse_beton import PAGE, write_sparse
from pipelines.beton import layout
from pipelines.beton.layout import ALLOC, HEADER
from pipelines.beton.reader import Beton, BetonError
from pipelines.beton.segments import RECORD, segments_path

pytestmark = pytest.mark.timeout(60)


def test_the_tables_order_does_not_matter_but_to_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [
        write_sparse(tmp_path / f"{shuffled}.beton", 5000, shuffled=shuffled)
        for shuffled in (False, True)
    ]
    one, two = (Beton.open(path) for path in paths)
    assert one.fingerprint != two.fingerprint
    for name in ("offsets", "sizes", "heights", "widths", "labels", "modes"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    per_page = PAGE // 110_000
    i = np.arange(5000)
    assert np.array_equal(
        one.offsets - one.offsets[0], i // per_page * PAGE + i % per_page * 110_000
    )
    assert (one.sizes == 110_000).all() and one.labels.max() < 1000 and one.heights.min() >= 200
    monkeypatch.setattr(layout, "_BLOCK", 7)  # the block size does not change the result
    small = Beton.open(paths[1])
    assert small.fingerprint == two.fingerprint
    for name in ("offsets", "sizes", "heights", "widths", "labels", "modes"):
        assert np.array_equal(getattr(small, name), getattr(two, name))
    assert small.segments is not None and small.segments.of(4999).shape == (
        -(-int(small.heights[4999]) // 16),
    )
    side = segments_path(paths[1])
    records = np.memmap(side, RECORD, "r+", side.stat().st_size - 5000 * RECORD.itemsize)
    records["first"][2345] += 1  # the first record of a block of 7
    records.flush()
    with pytest.raises(BetonError, match="sample 2345: expected lengths that follow"):
        Beton.open(paths[1])


@pytest.mark.parametrize("seed", range(12))
def test_samples_overlap_or_not_as_every_pair_says(tmp_path: Path, seed: int) -> None:
    """Samples of random sizes, some enlarged: the file opens only if no two share a byte."""
    path = write_sparse(tmp_path / "a.beton", 60, size=200_000, shuffled=True)
    draw = np.random.default_rng(seed)
    segments_path(path).unlink()  # it belongs to the unmodified table
    start = int(np.fromfile(path, HEADER, 1)[0]["alloc_table_ptr"])
    table = np.memmap(path, ALLOC, "r+", start, (60,))
    table["size"] = draw.integers(1, 200_000, 60)
    if seed % 3:
        row = int(
            np.flatnonzero(table["sample_id"] == draw.integers(40))[0]
        )  # not the last sample of a page
        room = PAGE - int(table["ptr"][row]) % PAGE
        table["size"][row] = min(room, 200_000 + int(draw.integers(1, 2 * 10**6)))
    first, end = table["ptr"], table["ptr"] + table["size"]
    shared = (first[:, None] < end[None, :]) & (first[None, :] < end[:, None])
    clash = bool((shared & ~np.eye(60, dtype=bool)).any())
    assert clash == bool(seed % 3)
    table.flush()
    if clash:
        with pytest.raises(BetonError, match=r"sample \d+: expected an offset after sample \d+"):
            Beton.open(path)
    else:
        with Beton.open(path) as beton:
            assert np.array_equal(beton.sizes[table["sample_id"]], table["size"])
