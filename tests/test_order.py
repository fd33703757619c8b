"""Order: permutations, slices of ranks, padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipelines.order import Order, key64, permutation
from pipelines.spec import LoaderSpec, Shard

pytestmark = pytest.mark.timeout(60)


def order(n: int, *, world: int = 1, rank: int = 0, batch: int = 4, **options: object) -> Order:
    spec = LoaderSpec(batch_size=batch, **options)  # type: ignore[arg-type]
    return Order(n, spec, Shard(rank, world))


@pytest.mark.parametrize("n", [1, 2, 37, 1000])
def test_a_permutation_holds_every_index_once(n: int) -> None:
    for seed, epoch in itertools.product((0, 5, 2**63), (0, 1, 90)):
        p = permutation(n, seed=seed, epoch=epoch)
        assert p.dtype == np.int64 and np.array_equal(np.sort(p), np.arange(n))
        assert np.array_equal(p, permutation(n, seed=seed, epoch=epoch))


def test_seeds_and_epochs_share_no_permutation() -> None:
    # With seed + epoch as the key, (0, 1) would repeat (1, 0).
    drawn = {permutation(1000, seed=s, epoch=e).tobytes() for s in (0, 1) for e in (0, 1, 2)}
    assert len(drawn) == 6
    keys = {int(key64(s, e)) for s in range(-20, 80) for e in range(-20, 80)}
    assert len(keys) == 100 * 100


def test_positions_are_uniform() -> None:
    """Where sample 0 lands, over 4000 epochs, against a flat histogram (chi-square, 9 d.o.f.)."""
    places = [int(np.argmin(permutation(10, seed=3, epoch=e))) for e in range(4000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 28  # exceeded once in a thousand draws


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", range(1, 41))
def test_coverage(n: int, world: int) -> None:
    for batch in (1, 2, 3, 5, 8):
        ranks = [order(n, world=world, rank=r, batch=batch, drop_last=False) for r in range(world)]
        steps = -(-n // (batch * world))
        assert [r.steps for r in ranks] == [steps] * world
        for epoch in (0, 1):
            parts = [r.batches(epoch) for r in ranks]
            assert all(i.shape == v.shape == (steps, batch) for i, v in parts)
            seen = np.concatenate([i[v] for i, v in parts])
            assert np.array_equal(np.sort(seen), np.arange(n))
            everything = np.concatenate([i.reshape(-1) for i, _ in parts])
            assert everything.min() >= 0 and everything.max() < n  # padding is readable
        whole = n // (batch * world)
        if whole == 0:
            with pytest.raises(ValueError, match="do not fill one global batch"):
                order(n, world=world, batch=batch)
            continue
        dropped = [order(n, world=world, rank=r, batch=batch).batches(0) for r in range(world)]
        seen = np.concatenate([i.reshape(-1) for i, _ in dropped])
        assert all(v.all() and i.shape == (whole, batch) for i, v in dropped)
        assert len(np.unique(seen)) == len(seen) == whole * batch * world


def test_the_stream_does_not_depend_on_the_world() -> None:
    alone = order(97, batch=12).batches(4)[0]
    for world in (2, 3, 4):
        parts = [order(97, world=world, rank=r, batch=12 // world) for r in range(world)]
        joined = np.concatenate([p.batches(4)[0] for p in parts], axis=1)
        assert np.array_equal(joined, alone)


def test_start_step_is_a_suffix() -> None:
    o = order(50, drop_last=False)
    indices, valid = o.batches(2)
    for start in range(o.steps + 1):
        tail, ok = o.batches(2, start)
        assert np.array_equal(tail, indices[start:]) and np.array_equal(ok, valid[start:])
    for wrong in (-1, o.steps + 1):
        with pytest.raises(ValueError, match=f"start_step {wrong} is not in an epoch of 13"):
            o.batches(2, wrong)


def test_without_shuffle_the_index_order_is_kept() -> None:
    assert order(12, shuffle=False).samples(7).tolist() == list(range(12))


def test_limit_is_one_subset_for_the_whole_run() -> None:
    limited = order(1000, limit=20)
    first = np.sort(limited.samples(0))
    assert len(np.unique(first)) == 20 and first.max() > 500  # drawn, not the head
    assert np.array_equal(np.sort(limited.samples(1)), first)
    assert not np.array_equal(limited.samples(1), limited.samples(0))
    assert np.array_equal(order(1000, limit=20, shuffle=False).samples(0), first)
    assert not np.array_equal(np.sort(order(1000, limit=20, seed=1).samples(0)), first)
    assert np.array_equal(order(20, limit=99).samples(3), order(20).samples(3))


def test_no_data_and_bad_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="the data set is empty"):
        order(0)
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2"):
        Shard(2, 2)
    for wrong in ({"limit": 0}, {"batch_size": 0}, {"samples": 0}, {"workers": -1}):
        with pytest.raises(ValueError, match="must"):
            LoaderSpec(**wrong)  # type: ignore[arg-type]
