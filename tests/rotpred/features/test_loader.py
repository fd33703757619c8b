"""`FeatureLoader`: batches of features with the order, masks and digest of images."""

from __future__ import annotations

import numpy as np
import torch

from pipelines.batch import IGNORE
from pipelines.sampling.order import Order
from pipelines.sampling.random_bits import digest64
from pipelines.spec import LoaderSpec
from rotpred.distributed import Rank
from rotpred.features.base import Features
from rotpred.features.loader import FeatureLoader

COUNT, BATCH = 23, 5


def features() -> Features:
    rng = np.random.default_rng(0)
    stages = {
        "res4": rng.normal(size=(COUNT, 3)).astype(np.float16),
        "res5": rng.normal(size=(COUNT, 4)).astype(np.float32),
    }
    indices = np.sort(rng.choice(100, COUNT, replace=False))
    return Features(stages, rng.integers(0, 4, COUNT), indices, "0123abcd", ("a", "b", "c", "d"))


def loader(rank: Rank | None = None, **options: object) -> FeatureLoader:
    options = {"batch_size": BATCH, "max_samples": COUNT, **options}
    spec = LoaderSpec(views="plain", **options)  # type: ignore[arg-type]
    return FeatureLoader(features(), spec, names=("res5", "res4"), rank=rank or Rank())


def test_rows_carry_their_features_labels_and_indices() -> None:
    data, seen = features(), []
    for batch in loader(drop_last=False).epoch(3):
        assert batch.images.dtype == torch.float32 and batch.images.shape == (BATCH, 7)
        rows = np.searchsorted(data.indices, batch.indices.numpy())
        assert np.array_equal(batch.images[:, :4].numpy(), data.stages["res5"][rows])
        assert np.array_equal(batch.images[:, 4:].numpy(), data.stages["res4"][rows])
        assert batch.labels.tolist() == data.labels[rows].tolist()
        assert torch.equal(batch.targets, torch.where(batch.valid, batch.labels, IGNORE))
        seen += batch.indices[batch.valid].tolist()
    assert sorted(seen) == data.indices.tolist()


def test_the_digest_is_that_of_images_whose_boxes_are_zeros() -> None:
    """Runs of earlier versions resume: their checkpoints hold this number."""
    made, expected = loader(drop_last=False), 0
    for epoch in (0, 1):
        assert sum(1 for _ in made.epoch(epoch)) == len(made) == 5
        order = Order(COUNT, made.spec, Rank().shard).samples(epoch)
        boxes = np.zeros((COUNT, 5), np.int32)
        expected += digest64(epoch, features().indices[order], boxes)
    assert made.digest == expected % 2**64 == 0xB7C06E0FF26D6A33


def test_ranks_share_a_global_batch_and_any_step_can_be_the_first() -> None:
    whole = [batch.indices.tolist() for batch in loader(batch_size=2 * BATCH).epoch(1)]
    parts = [loader(Rank(rank, rank, 2, 2)) for rank in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    halves = [[batch.indices.tolist() for batch in part.epoch(1, start_step=1)] for part in parts]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole[1:]
