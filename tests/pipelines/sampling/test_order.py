"""Sample order: permutations, slices of ranks, padding."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from pipelines.sampling.order import Order, bijection, permutation
from pipelines.sampling.random_bits import key64
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
    """Position of sample 0 over 4000 epochs, against a flat histogram (chi-square, 9 d.o.f.)."""
    places = [int(np.argmin(permutation(10, seed=3, epoch=e))) for e in range(4000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 28  # exceeded once in a thousand


LARGE = 2_500_000
"""Size of a data set whose permutation is computed, not drawn."""


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 99, 100, 101, 4095, 4097, 99_991])
def test_the_bijection_meets_every_index_once(n: int) -> None:
    everything = np.arange(n)
    for key in range(3):
        sent = bijection(everything, n, key)
        assert np.array_equal(np.sort(sent), everything)
        some = np.random.default_rng(key).integers(0, n, 50)
        assert np.array_equal(bijection(some, n, key), sent[some])
    with pytest.raises(ValueError, match="at most"):
        bijection(everything, 2**32 + 1, 0)


def test_places_of_an_order_are_its_own_whether_drawn_or_computed() -> None:
    for n in (1000, LARGE):
        whole = permutation(n, seed=1, epoch=2)
        some = np.random.default_rng(0).integers(0, n, 1000)
        assert np.array_equal(permutation(n, seed=1, epoch=2, at=some), whole[some])
    assert np.array_equal(np.sort(whole), np.arange(LARGE))
    assert not np.array_equal(permutation(LARGE, seed=1, epoch=3, at=some), whole[some])
    assert not np.array_equal(permutation(LARGE, seed=2, epoch=2, at=some), whole[some])


def chi_square(bins: npt.NDArray[np.int64], count: int) -> float:
    """Deviation of a histogram from flat, in standard deviations of chi-square (about normal)."""
    expected = len(bins) / count
    found = ((np.bincount(bins, minlength=count) - expected) ** 2 / expected).sum()
    return float((found - (count - 1)) / np.sqrt(2 * (count - 1)))


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_computed_order_looks_drawn(epoch: int) -> None:
    """Positions, distances of neighbours and relation of two epochs, each against flat."""
    p, other = (permutation(LARGE, seed=0, epoch=e) for e in (epoch, epoch + 10))
    place, n = np.arange(LARGE), LARGE
    assert chi_square(place * 32 // n * 32 + p * 32 // n, 1024) < 4
    assert chi_square(place % 32 * 32 + p % 32, 1024) < 4
    for step in (1, 2, 256, 1582, 65_536):  # 1582: about the root of n, the network's halves
        apart = (p[step:] - p[:-step]) % n
        assert abs(chi_square(apart * 1000 // n, 1000)) < 4
    assert abs(chi_square((p - other) % n * 1000 // n, 1000)) < 4
    fixed = int((p == place).sum())
    assert fixed < 10  # one is expected: Poisson
    signs = np.diff(p) > 0
    assert abs(signs.mean() - 0.5) < 0.002


def test_the_orders_are_pinned() -> None:
    """A run resumed with a later version must see the same samples: these may not change."""
    first = np.arange(5)
    assert permutation(50_000, seed=0, epoch=0, at=first).tolist() == DRAWN
    assert permutation(14_000_000, seed=0, epoch=0, at=first).tolist() == COMPUTED


DRAWN = [17414, 48008, 12754, 28490, 6326]
COMPUTED = [8104842, 13210767, 11735393, 11610817, 113559]


def test_a_rank_of_a_large_data_set_takes_its_slice_of_the_order() -> None:
    for limit in (None, LARGE - 1_000_000):
        alone = order(LARGE, batch=240_000, max_samples=limit, drop_last=False)
        indices, valid = alone.batches(3, alone.steps - 2)
        size = LARGE if limit is None else limit
        whole = alone.samples(3)
        assert np.array_equal(indices[valid], whole[(alone.steps - 2) * 240_000 :])
        assert (indices[~valid] == whole[-1]).all() and valid.sum() == 240_000 + size % 240_000
        for rank in range(3):
            one = order(
                LARGE, world=3, rank=rank, batch=80_000, max_samples=limit, drop_last=False
            ).batches(3, alone.steps - 2)
            mine = slice(rank * 80_000, (rank + 1) * 80_000)
            assert np.array_equal(one[0], indices[:, mine])
            assert np.array_equal(one[1], valid[:, mine])


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


def test_max_samples_is_one_subset_for_the_whole_run() -> None:
    limited = order(1000, max_samples=20)
    first = np.sort(limited.samples(0))
    assert len(np.unique(first)) == 20 and first.max() > 500  # drawn, not the first samples
    assert np.array_equal(np.sort(limited.samples(1)), first)
    assert not np.array_equal(limited.samples(1), limited.samples(0))
    assert np.array_equal(order(1000, max_samples=20, shuffle=False).samples(0), first)
    assert not np.array_equal(np.sort(order(1000, max_samples=20, seed=1).samples(0)), first)
    assert np.array_equal(order(20, max_samples=99).samples(3), order(20).samples(3))


def test_no_data_and_bad_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="the data set is empty"):
        order(0)
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2"):
        Shard(2, 2)
    for wrong in ({"max_samples": 0}, {"batch_size": 0}, {"samples": 0}, {"workers": -1}):
        with pytest.raises(ValueError, match="must"):
            LoaderSpec(**wrong)  # type: ignore[arg-type]
