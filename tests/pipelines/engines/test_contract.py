"""The contract of all engines: sample order, ranks, resuming, ownership, threads, memory."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import numpy as np
import pytest
import torch

from pipelines.batch import IGNORE, Batch
from pipelines.sampling.crops import crop_boxes
from pipelines.sampling.order import permutation
from pipelines.spec import (
    RandomResizedCrop,
    Resize,
    Shard,
)
from tests.support.batches import check_batch
from tests.support.engines import ALL, REAL, engines, epoch_of, equal, served
from tests.support.images import COUNT

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", ALL)
def test_every_sample_once_over_ranks(open_engine, name: str, world: int) -> None:
    loaders = [open_engine(name, shard=Shard(rank, world)) for rank in range(world)]
    epochs = [epoch_of(loader) for loader in loaders]
    steps = -(-COUNT // (5 * world))
    assert [len(e) for e in epochs] == [len(loader) for loader in loaders] == [steps] * world
    for batch in (b for e in epochs for b in e):
        check_batch(batch, views=1, batch_size=5, size=24)
        assert torch.equal(batch.targets == IGNORE, ~batch.valid)
        assert torch.equal(batch.targets[batch.valid], batch.labels[batch.valid])
        assert 0 <= batch.images.min() and batch.images.max() <= 255
    assert sorted(i for e in epochs for i in served(e)) == list(range(COUNT))
    # The sum of the digests does not depend on the world size: the crops are the same.
    whole = open_engine(name, batch_size=7)
    epoch_of(whole)
    assert sum(loader.digest for loader in loaders) % 2**64 == whole.digest


@pytest.mark.parametrize("name", ALL)
def test_drop_last_serves_whole_batches(open_engine, name: str) -> None:
    loaders = [open_engine(name, shard=Shard(rank, 3), drop_last=True) for rank in range(3)]
    got = [served(epoch_of(loader)) for loader in loaders]
    assert [len(g) for g in got] == [10, 10, 10]
    assert len({i for one in got for i in one}) == 30


@pytest.mark.parametrize("name", ALL)
def test_rotate4_rows_are_rotation_major(open_engine, name: str) -> None:
    views = epoch_of(open_engine(name, views="rotate4"))
    plain = epoch_of(open_engine(name))
    for turned, straight in zip(views, plain, strict=True):
        check_batch(turned, views=4, batch_size=5, size=24)
        for k in range(4):
            rows = slice(5 * k, 5 * k + 5)
            assert torch.equal(turned.images[rows], torch.rot90(straight.images, k, (2, 3)))
            ok = straight.valid
            assert torch.equal(turned.targets[rows], torch.where(ok, k, IGNORE))
        assert torch.equal(turned.labels, straight.labels)


@pytest.mark.parametrize("name", ALL)
def test_an_epoch_is_a_function_of_seed_and_number(open_engine, name: str) -> None:
    one, two, other = open_engine(name), open_engine(name), open_engine(name, seed=1)
    first = epoch_of(one, 3)
    digest = one.digest
    assert equal(first, epoch_of(two, 3)) and two.digest == digest
    again = epoch_of(one, 3)  # the same loader, a second time
    assert equal(first, again)
    later, shifted = epoch_of(one, 4), epoch_of(other, 3)
    assert served(first) != served(later) and served(first) != served(shifted)
    assert other.digest != digest


@pytest.mark.parametrize("name", ALL)
def test_start_step_gives_the_tail(open_engine, name: str) -> None:
    loader = open_engine(name)
    whole = epoch_of(loader, 2)
    for start in (1, 3, len(whole) - 1, len(whole)):
        assert equal(epoch_of(loader, 2, start), whole[start:])
    resumed = loader.epoch(2, start_step=2)  # and in small parts
    pieces = [next(resumed)]
    resumed.close()
    pieces += epoch_of(loader, 2, 3)
    assert equal(pieces, whole[2:])
    with pytest.raises(ValueError, match="start_step 9"):
        epoch_of(loader, 2, 9)


@pytest.mark.parametrize("name", ALL)
def test_the_world_may_change_at_any_step(open_engine, name: str) -> None:
    alone = epoch_of(open_engine(name, batch_size=6))
    for world, batch in ((2, 3), (3, 2)):
        ranks = [
            epoch_of(open_engine(name, batch_size=batch, shard=Shard(r, world)), 0, 2)
            for r in range(world)
        ]
        for step, batches in enumerate(zip(*ranks, strict=True), 2):
            assert served(list(batches)) == served([alone[step]])
            if not name.startswith("synthetic"):  # synthetic pixels belong to the slot
                assert torch.equal(torch.cat([b.images for b in batches]), alone[step].images)


@pytest.mark.parametrize("name", ALL)
def test_batches_belong_to_the_consumer(open_engine, name: str) -> None:
    kept, copies = [], []
    for batch in open_engine(name, batch_size=2, views="rotate4").epoch(0):
        kept.append(batch)
        copies.append(Batch(*(t.clone() for t in batch)))
    assert len(kept) == 19 and equal(kept, copies)


@pytest.mark.parametrize(("views", "batch"), [("rotate4", 4), ("plain", 16)])
def test_memory_that_the_consumer_has_dropped_is_used_again(
    open_engine, views: str, batch: int
) -> None:
    """No new pages: mapping them takes longer than filling them."""
    options = {"views": views, "batch_size": batch, "samples": 10 * batch}
    batches = open_engine("synthetic-none", crop=RandomResizedCrop(224), **options).epoch(0)
    for _ in range(3):
        size = next(batches).images.nbytes
    before = getrusage(RUSAGE_SELF).ru_minflt
    count = sum(1 for _batch in batches)
    fresh = count * size / os.sysconf("SC_PAGE_SIZE")
    assert count == 7 and getrusage(RUSAGE_SELF).ru_minflt - before < fresh / 4


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("name", ALL)
def test_an_epoch_may_be_abandoned(open_engine, name: str) -> None:
    loader = open_engine(name, batch_size=2)
    whole = epoch_of(loader, 0)
    before = threads()
    for _ in range(20):
        for _batch in loader.epoch(1):
            break
    assert equal(epoch_of(loader, 0), whole)
    deadline = time.monotonic() + 5
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threads() <= before


@pytest.mark.parametrize("name", REAL)
def test_close_ends_the_threads_and_unlocks_the_file(open_engine, name: str) -> None:
    before = {t.name for t in threading.enumerate()}
    loader = open_engine(name)
    next(loader.epoch(0))
    loader.close()
    # Threads that rotate crops belong to the process, not to a loader.
    left = {t.name for t in threading.enumerate() if not t.name.startswith("rotate")}
    assert left <= before


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("name", engines("folder-beton", "dali-beton"))
def test_the_next_epoch_is_begun_before_it_is_asked_for(
    open_engine, monkeypatch: pytest.MonkeyPatch, name: str, shuffle: bool
) -> None:
    engine = name.split("-")[0]
    source = "" if engine == "folder" else ".source"
    begun: set[int] = set()

    def noted(*args: object, epoch: int, **options: object) -> object:
        begun.add(epoch)
        return crop_boxes(*args, epoch=epoch, **options)  # type: ignore[arg-type]

    loader = open_engine(name, shuffle=shuffle)
    monkeypatch.setattr(f"pipelines.engines.{engine}{source}.crop_boxes", noted)
    epoch = loader.epoch(0)
    for _ in range(len(loader)):
        next(epoch)
    epoch.close()  # at the last batch, as a training loop does
    opened = loader.source
    pool = opened._feed._worker if engine == "dali" else opened._pool
    pool.submit(int).result(30)  # after everything else queued for its only thread
    # Validation reads epoch 0 repeatedly. DALI's feed cannot know that and discards its work.
    assert begun == ({0, 1} if shuffle or engine == "dali" else {0})
    assert served(epoch_of(loader, 1)) == served(epoch_of(open_engine(name, shuffle=shuffle), 1))


@pytest.mark.parametrize("name", engines("folder-beton", "ffcv-beton", "dali-beton"))
def test_memory_does_not_grow_with_epochs(open_engine, name: str) -> None:
    """Finished and abandoned epochs. Keeping one batch of 1.8 MB of each would take 36 MB."""
    loader = open_engine(
        name, batch_size=12, max_samples=24, crop=RandomResizedCrop(224), workers=2
    )
    resident = []
    for epoch in range(30):
        batches = loader.epoch(epoch)
        next(batches)
        if epoch % 3:
            next(batches)
        batches.close()
        resident.append(_resident_mb())
    assert np.median(resident[-4:]) - np.median(resident[8:12]) < 25, resident


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize("name", ALL)
def test_a_batch_larger_than_the_data_is_refused(open_engine, name: str) -> None:
    with pytest.raises(ValueError, match="do not fill one global batch of 60"):
        open_engine(name, batch_size=20, drop_last=True, shard=Shard(0, 3))
    (batch,) = epoch_of(open_engine(name, batch_size=40))
    assert batch.valid.sum() == COUNT


@pytest.mark.parametrize("name", ALL)
def test_max_samples_takes_the_same_samples_everywhere(open_engine, name: str) -> None:
    loader = open_engine(name, max_samples=9, shuffle=False)
    expected = np.sort(permutation(COUNT, seed=0, epoch=-0x11317)[:9])
    assert served(epoch_of(loader)) == expected.tolist()


@pytest.mark.parametrize("name", engines("folder", "dali"))
def test_a_list_file_is_a_data_set(open_engine, folder: Path, name: str) -> None:
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*.jpg"))][:7]
    source = folder / f"list-{name}.txt"
    source.write_text("".join(f"{path} {5 + i}\n" for i, path in enumerate(names)))
    try:
        loader = open_engine(f"{name}-{source}", shuffle=False, crop=Resize(16))
        batches = epoch_of(loader)
        labels = torch.cat([b.labels[b.valid] for b in batches]).tolist()
        assert labels == list(range(5, 12))
    finally:
        source.unlink()
