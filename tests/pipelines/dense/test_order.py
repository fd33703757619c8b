"""Sample order for images of variable size: groups, equal counts, independence of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.dense.order import EndlessOrder, SinglePassOrder, by_shape
from pipelines.spec import Shard

pytestmark = pytest.mark.timeout(60)

SIZES = np.random.default_rng(0).integers(50, 60, (41, 2))
GROUPS = by_shape(SIZES)


def endless(rank: int = 0, world: int = 1, batch: int = 4, seed: int = 0) -> EndlessOrder:
    return EndlessOrder(GROUPS, batch, Shard(rank, world), seed)


def test_groups_are_by_shape() -> None:
    lying, standing = GROUPS
    assert sorted([*lying, *standing]) == list(range(41))
    assert (SIZES[lying, 1] >= SIZES[lying, 0]).all()
    assert (SIZES[standing, 0] > SIZES[standing, 1]).all()
    assert len(by_shape(SIZES[lying])) == 1


def test_every_image_comes_equally_often_and_groups_do_not_mix() -> None:
    counts = np.zeros(41, int)
    order, standing = endless(), set(GROUPS[1].tolist())
    for step in range(300):
        places = order.at(step)
        assert len({int(i) in standing for i in places.indices}) == 1 and places.valid.all()
        # The pass of an image: how often it has come before.
        for i, number in zip(places.indices, places.passes, strict=True):
            assert number == counts[i]
            counts[i] += 1
        mean = counts.sum() / 41  # per group as well, within one batch and one pass
        assert abs(counts - mean).max() < 2
    assert counts.sum() == 1200


@pytest.mark.parametrize("world", [2, 4])
def test_the_order_does_not_depend_on_the_world(world: int) -> None:
    whole = endless(batch=8)
    for step in (0, 1, 7, 10**6):
        parts = [endless(rank, world, 8 // world).at(step) for rank in range(world)]
        for k in range(2):
            assert np.array_equal(np.concatenate([p[k] for p in parts]), whole.at(step)[k])


def test_the_seed_decides_and_groups_have_permutations_of_their_own() -> None:
    one, two = ([tuple(endless(seed=s).at(t).indices) for t in range(8)] for s in (0, 1))
    assert one != two and one == [tuple(endless().at(t).indices) for t in range(8)]
    passes = [endless(batch=1).at(t) for t in range(41 * 4)]
    first = {tuple(int(p.indices[0]) for p in passes if p.passes[0] == k) for k in range(3)}
    assert len(first) == 3


def test_a_batch_larger_than_its_group() -> None:
    places = EndlessOrder((np.array([5, 9]),), 5, Shard(), 0).at(1)
    assert places.passes.tolist() == [2, 3, 3, 4, 4] and set(places.indices) == {5, 9}


@pytest.mark.parametrize(("n", "world", "batch"), [(7, 2, 2), (8, 2, 2), (1, 3, 2), (10, 3, 1)])
def test_evaluation_sees_every_image_once(n: int, world: int, batch: int) -> None:
    orders = [SinglePassOrder(n, batch, Shard(rank, world)) for rank in range(world)]
    assert len({order.steps for order in orders}) == 1
    seen = [
        int(i)
        for step in range(orders[0].steps)
        for order in orders
        for i, ok in zip(order.at(step).indices, order.at(step).valid, strict=True)
        if ok
    ]
    assert seen == list(range(n))
