"""The dense loader: contents of batches, ranks, resuming, evaluation counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.datasets.annotations import IGNORED
from pipelines.dense.batch import DenseBatch, Target
from pipelines.dense.loader import DenseLoader, open_dense
from pipelines.dense.samples import open_dense_samples, training_objects
from pipelines.dense.spec import DenseSpec, FitWithin, RatioCrop, ShortSide
from pipelines.spec import Normalize, Shard
from tests.support import dense_trees

pytestmark = pytest.mark.timeout(60)

N = 5
PLAIN = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All data sets. Tests only read them."""
    folder = tmp_path_factory.mktemp("dense")
    for write_tree in (dense_trees.voc, dense_trees.voc_masks, dense_trees.coco):
        write_tree(folder, N)
    return folder


def boxes(base: Path, **options: object) -> DenseSpec:
    geometry = ShortSide((48, 64, 80), 100)
    spec = DenseSpec(root=str(base / "VOCdevkit"), geometry=geometry, workers=2, timeout=30)
    return replace(spec, **options)  # type: ignore[arg-type]


def objects(base: Path, **options: object) -> DenseSpec:
    return boxes(base, data="coco:train2017", root=str(base / "coco"), **options)


def masks(base: Path, **options: object) -> DenseSpec:
    geometry = RatioCrop(64, long=128, short=72)
    crops = {"data": "vocseg:2012/train_aug", "geometry": geometry, "photometric": True}
    return boxes(base, **{**crops, **options})


def batches(
    spec: DenseSpec, epoch: int = 0, start: int = 0, shard: Shard | None = None
) -> tuple[list[DenseBatch], DenseLoader]:
    with open_dense(spec, shard=shard) as loader:
        return list(loader.epoch(epoch, start_step=start)), loader


def same_target(one: Target, two: Target) -> None:
    assert one.keys() == two.keys()
    for (name, a), b in zip(one.items(), two.values(), strict=True):
        assert torch.equal(a, b), name  # type: ignore[arg-type]


def rows_equal(one: DenseBatch, i: int, two: DenseBatch, k: int) -> None:
    """Whether sample i of one batch equals sample k of the other, apart from padding."""
    assert torch.equal(one.sizes[i], two.sizes[k]) and one.valid[i] == two.valid[k]
    assert one.indices[i] == two.indices[k]
    height, width = one.sizes[i].tolist()
    part = np.s_[:, :height, :width]
    assert torch.equal(one.images[i][part], two.images[k][part])
    assert bool(one.targets) == bool(two.targets)
    if one.targets:
        same_target(one.targets[i], two.targets[k])
    if one.masks is not None:
        assert two.masks is not None and torch.equal(one.masks[i], two.masks[k])


def check_equal(one: Sequence[DenseBatch], two: Sequence[DenseBatch]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.images.shape == b.images.shape
        for i in range(len(a.indices)):
            rows_equal(a, i, b, i)


@pytest.mark.parametrize("kind", [boxes, objects, masks])
def test_a_training_batch_is_what_its_contract_says(base: Path, kind: type) -> None:
    spec = kind(base, steps_per_epoch=6)
    found, loader = batches(spec)
    assert len(loader) == len(found) == 6 and loader.engine == "dense" and loader.wait_seconds > 0
    assert loader.classes == loader.samples.classes and loader.data_id == loader.samples.data_id
    for batch in found:
        rows, channels, height, width = batch.images.shape
        assert (rows, channels, height % 32, width % 32) == (2, 3, 0, 0)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.valid.all() and batch.indices.dtype == batch.sizes.dtype == torch.int64
        assert np.array_equal(batch.originals, loader.samples.sizes[batch.indices])
        for row, (h, w) in zip(batch.images, batch.sizes.tolist(), strict=True):
            assert not row[:, h:].any() and not row[:, :, w:].any() and row[:, :h, :w].any()
        if kind is masks:
            assert (height, width) == (64, 64) and not batch.targets
            assert batch.masks is not None and batch.masks.dtype == torch.int64
            for mask, (h, w) in zip(batch.masks, batch.sizes.tolist(), strict=True):
                assert (mask[h:] == IGNORED).all() and (mask[:, w:] == IGNORED).all()
            continue
        assert batch.masks is None and len(batch.targets) == 2
        for target, i, (h, w) in zip(batch.targets, batch.indices, batch.sizes, strict=True):
            truth = loader.samples.objects(int(i))
            assert target["boxes"].dtype == torch.float32 and type(target["boxes"]) is torch.Tensor
            assert target["labels"].tolist() == (truth.labels[~truth.crowd] + 1).tolist()
            assert (target["boxes"][:, 2] <= w).all() and (target["boxes"][:, 3] <= h).all()
            if kind is objects:
                assert target["masks"].shape == (len(target["labels"]), h, w)
                assert target["masks"].dtype == torch.uint8 and target["masks"].max() == 1


def test_objects_without_their_masks(base: Path) -> None:
    """Everything except the masks is equal, the fingerprint of the data included."""
    spec = objects(base, steps_per_epoch=4)
    bare = replace(spec, masks=False)
    assert bare.fingerprint_fields() == spec.fingerprint_fields()
    (whole, one), (found, other) = batches(spec), batches(bare)
    assert one.digest == other.digest and one.data_id == other.data_id
    for batch in whole:
        for target in batch.targets:
            del target["masks"]
    assert [target.keys() for batch in found for target in batch.targets] == [
        {"boxes", "labels"}
    ] * 8
    check_equal(whole, found)
    with pytest.raises(ValueError, match="masks=False leaves nothing to learn"):
        open_dense(masks(base, masks=False))


def test_pixels_are_normalised(base: Path) -> None:
    spec = boxes(base, data="voc:2007/test", train=False, geometry=ShortSide((96,), 200))
    plain, loader = batches(replace(spec, normalize=PLAIN))
    normal = Normalize((10.0, 20.0, 30.0), (2.0, 4.0, 8.0))
    with open_dense(replace(spec, normalize=normal), precision="bf16") as other:
        scaled = list(other.epoch(0))
    for one, two in zip(plain, scaled, strict=True):
        assert two.images.dtype == torch.bfloat16
        for i, (h, w) in enumerate(one.sizes.tolist()):
            stored = Image.open(loader.samples.path(int(one.indices[i]))).convert("RGB")
            pixels = torch.from_numpy(np.array(stored)).permute(2, 0, 1)
            assert (
                abs(one.images[i, :, :h, :w] - pixels).max() <= 1
            )  # decoders may differ by one level
            want = (one.images[i] - torch.tensor([[[10.0]], [[20.0]], [[30.0]]])) / torch.tensor(
                [[[2.0]], [[4.0]], [[8.0]]]
            )
            want[:, h:], want[:, :, w:] = 0, 0
            assert torch.equal(two.images[i], want.bfloat16())


@pytest.mark.parametrize("kind", [boxes, objects, masks])
def test_two_ranks_see_what_one_sees(base: Path, kind: type) -> None:
    spec = kind(base, steps_per_epoch=4)
    whole, one = batches(replace(spec, batch_size=4), epoch=1)
    parts = [batches(spec, epoch=1, shard=Shard(rank, 2)) for rank in range(2)]
    for step, batch in enumerate(whole):
        for i in range(4):
            rows_equal(parts[i // 2][0][step], i % 2, batch, i)
    assert sum(loader.digest for _, loader in parts) % 2**64 == one.digest != 0


@pytest.mark.parametrize("kind", [boxes, masks])
def test_epochs_do_not_depend_on_what_came_before(base: Path, kind: type) -> None:
    spec = kind(base, steps_per_epoch=4)
    with open_dense(spec) as loader:
        first, second = list(loader.epoch(0)), list(loader.epoch(1))
        digest = loader.digest
        left = loader.epoch(0)
        next(left)
        left.close()
        check_equal(list(loader.epoch(1, start_step=1)), second[1:])
        check_equal(list(loader.epoch(0)), first)
        assert not list(loader.epoch(0, start_step=4))
        with pytest.raises(ValueError, match="start_step 5 is not in an epoch of 4 steps"):
            next(loader.epoch(0, start_step=5))
    check_equal(batches(spec, epoch=1, start=2)[0], second[2:])
    resumed = batches(spec)[1].digest + batches(spec, epoch=1)[1].digest
    assert digest == resumed % 2**64
    assert batches(replace(spec, seed=1))[1].digest != batches(spec)[1].digest
    assert batches(replace(spec, workers=1))[1].digest == batches(spec)[1].digest


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("data", ["voc:2007/test", "vocseg:2012/val", "coco:val2017"])
def test_evaluation_reads_every_image_once(base: Path, data: str, world: int) -> None:
    root = base / ("coco" if data.startswith("coco") else "VOCdevkit")
    spec = boxes(base, data=data, root=str(root), train=False, geometry=FitWithin(96, 48))
    seen: list[int] = []
    steps = set()
    for rank in range(world):
        found, loader = batches(spec, shard=Shard(rank, world))
        steps.add(len(found))
        for batch in found:
            assert len(batch.indices) == 2 and not batch.targets and batch.masks is None
            assert (batch.sizes.amin(1) == 48).all() and torch.equal(
                batch.originals, torch.from_numpy(loader.samples.sizes)[batch.indices]
            )
            seen += batch.indices[batch.valid].tolist()
    assert len(steps) == 1 and sorted(seen) == list(range(len(loader.samples)))
    again = batches(spec, epoch=3)[0]
    check_equal(batches(spec)[0], again)


def test_what_is_trained_on(base: Path) -> None:
    spec = boxes(base, data="voc:2007/trainval", keep_difficult=False)
    samples = open_dense_samples(spec)
    counts = [len(training_objects(samples.objects(i), spec).labels) for i in range(N)]
    assert counts == [2, 2, 2, 1, 2]
    coco_spec = objects(base, steps_per_epoch=30)
    found, loader = batches(coco_spec)
    empty = [i for i in range(N + 1) if not len(loader.samples.objects(i).labels)]
    seen = {int(i) for batch in found for i in batch.indices}
    assert len(empty) == 1 and seen == set(range(N + 1)) - set(empty)
    found, loader = batches(replace(coco_spec, keep_empty=True))
    assert seen | set(empty) == {int(i) for batch in found for i in batch.indices}
    for batch in found:
        for i, target in zip(batch.indices.tolist(), batch.targets, strict=True):
            if i in empty:
                assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
                assert target["masks"].shape == (0, *batch.sizes[batch.indices == i][0])


def test_steps_of_an_epoch(base: Path) -> None:
    assert len(batches(boxes(base))[1]) == 2 * N // 2
    assert len(batches(boxes(base, batch_size=64))[1]) == 1
    assert len(batches(boxes(base, max_samples=4), shard=Shard(1, 2))[1]) == 1
    with pytest.raises(ValueError, match="RatioCrop is for training on masks only"):
        open_dense(boxes(base, geometry=RatioCrop()))
    with pytest.raises(ValueError, match="RatioCrop is for training on masks only"):
        open_dense(masks(base, train=False))
    with pytest.raises(ValueError, match="classes are for voc and vocseg data"):
        open_dense(objects(base, classes=("a",)))
