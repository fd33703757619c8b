"""One contract, every engine: what is served, when, to whom, and that nothing else changes it."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from pipelines.batch import IGNORE, Batch, check_batch
from pipelines.beton.reader import Beton
from pipelines.conversion.convert import write_beton
from pipelines.datasets.index import SampleIndex
from pipelines.engines.choice import choose_engine
from pipelines.imaging.decode import ImageError
from pipelines.loader import Loader, open_loader
from pipelines.sampling.crops import crop_boxes
from pipelines.sampling.order import permutation
from pipelines.spec import (
    CenterCrop,
    Crop,
    LoaderSpec,
    Normalize,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Shard,
)
from tests.conftest import COUNT, save_jpeg, smooth_image

pytestmark = pytest.mark.timeout(120)

PIXELS = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Leaves pixels as they are, 0 to 255."""

MEASURED = {"folder": (0.0, 0), "dali": (0.4, 1), "ffcv": (2.0, 8)}
"""Difference to the folder engine that is allowed, in levels of 256: of an image's mean, and of any
pixel.

Measured on these images: DALI 0.26 and 1, the same decoder and filter with other rounding. FFCV
1.3 and 5: it decodes with the fast DCT."""

MISSING = {
    engine: f"{module} is not installed"
    for engine, module in (("ffcv", "ffcv"), ("dali", "nvidia"))
    if importlib.util.find_spec(module) is None
}


def engines(*names: str) -> list[object]:
    """Test parameters "engine-data", skipped with the reason where an engine is missing."""
    return [
        pytest.param(
            name,
            marks=[pytest.mark.skip(reason=MISSING[engine])] if engine in MISSING else [],
        )
        for name in names
        for engine in [name.split("-")[0]]
    ]


REAL = engines("folder-folder", "folder-beton", "ffcv-beton", "dali-folder", "dali-beton")
ALL = [*REAL, "synthetic-none"]
OTHERS = engines("folder-beton", "ffcv-beton", "dali-folder", "dali-beton")


@pytest.fixture
def make(folder: Path, beton: Path) -> Iterator[object]:
    """Open a loader over the shared data set; closed at the end of the test."""
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


def epoch_of(loader: Loader, epoch: int = 0, start: int = 0) -> list[Batch]:
    return list(loader.epoch(epoch, start_step=start))


def served(batches: list[Batch]) -> list[int]:
    return [int(i) for b in batches for i in b.indices[b.valid[: len(b.indices)]]]


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y)
        for one, two in zip(a, b, strict=True)
        for x, y in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", ALL)
def test_every_sample_once_over_ranks(make, name: str, world: int) -> None:
    loaders = [make(name, shard=Shard(rank, world)) for rank in range(world)]
    epochs = [epoch_of(loader) for loader in loaders]
    steps = -(-COUNT // (5 * world))
    assert [len(e) for e in epochs] == [len(loader) for loader in loaders] == [steps] * world
    for batch in (b for e in epochs for b in e):
        check_batch(batch, views=1, batch_size=5, size=24)
        assert torch.equal(batch.targets == IGNORE, ~batch.valid)
        assert torch.equal(batch.targets[batch.valid], batch.labels[batch.valid])
        assert 0 <= batch.images.min() and batch.images.max() <= 255
    assert sorted(i for e in epochs for i in served(e)) == list(range(COUNT))
    # Sums of digests do not depend on the world: the same crops were cut.
    whole = make(name, batch_size=7)
    epoch_of(whole)
    assert sum(loader.digest for loader in loaders) % 2**64 == whole.digest


@pytest.mark.parametrize("name", ALL)
def test_drop_last_serves_whole_batches(make, name: str) -> None:
    loaders = [make(name, shard=Shard(rank, 3), drop_last=True) for rank in range(3)]
    got = [served(epoch_of(loader)) for loader in loaders]
    assert [len(g) for g in got] == [10, 10, 10]
    assert len({i for one in got for i in one}) == 30


@pytest.mark.parametrize("name", ALL)
def test_rotate4_rows_are_rotation_major(make, name: str) -> None:
    views = epoch_of(make(name, views="rotate4"))
    plain = epoch_of(make(name))
    for turned, straight in zip(views, plain, strict=True):
        check_batch(turned, views=4, batch_size=5, size=24)
        for k in range(4):
            rows = slice(5 * k, 5 * k + 5)
            assert torch.equal(turned.images[rows], torch.rot90(straight.images, k, (2, 3)))
            ok = straight.valid
            assert torch.equal(turned.targets[rows], torch.where(ok, k, IGNORE))
        assert torch.equal(turned.labels, straight.labels)


@pytest.mark.parametrize("name", ALL)
def test_an_epoch_is_a_function_of_seed_and_number(make, name: str) -> None:
    one, two, other = make(name), make(name), make(name, seed=1)
    first = epoch_of(one, 3)
    digest = one.digest
    assert equal(first, epoch_of(two, 3)) and two.digest == digest
    again = epoch_of(one, 3)  # the same loader, asked twice
    assert equal(first, again)
    later, shifted = epoch_of(one, 4), epoch_of(other, 3)
    assert served(first) != served(later) and served(first) != served(shifted)
    assert other.digest != digest


@pytest.mark.parametrize("name", ALL)
def test_start_step_gives_the_tail(make, name: str) -> None:
    loader = make(name)
    whole = epoch_of(loader, 2)
    for start in (1, 3, len(whole) - 1, len(whole)):
        assert equal(epoch_of(loader, 2, start), whole[start:])
    resumed = loader.epoch(2, start_step=2)  # and in small pieces
    pieces = [next(resumed)]
    resumed.close()
    pieces += epoch_of(loader, 2, 3)
    assert equal(pieces, whole[2:])
    with pytest.raises(ValueError, match="start_step 9"):
        epoch_of(loader, 2, 9)


@pytest.mark.parametrize("name", ALL)
def test_the_world_may_change_at_any_step(make, name: str) -> None:
    alone = epoch_of(make(name, batch_size=6))
    for world, batch in ((2, 3), (3, 2)):
        ranks = [
            epoch_of(make(name, batch_size=batch, shard=Shard(r, world)), 0, 2)
            for r in range(world)
        ]
        for step, batches in enumerate(zip(*ranks, strict=True), 2):
            assert served(list(batches)) == served([alone[step]])
            if not name.startswith("synthetic"):  # whose pixels belong to the slot
                assert torch.equal(torch.cat([b.images for b in batches]), alone[step].images)


@pytest.mark.parametrize("name", ALL)
def test_batches_belong_to_the_consumer(make, name: str) -> None:
    kept, copies = [], []
    for batch in make(name, batch_size=2, views="rotate4").epoch(0):
        kept.append(batch)
        copies.append(Batch(*(t.clone() for t in batch)))
    assert len(kept) == 19 and equal(kept, copies)


@pytest.mark.parametrize(("views", "batch"), [("rotate4", 4), ("plain", 16)])
def test_memory_that_the_consumer_has_dropped_is_used_again(make, views: str, batch: int) -> None:
    """No fresh pages: mapping those takes longer than filling them."""
    options = {"views": views, "batch_size": batch, "samples": 10 * batch}
    batches = make("synthetic-none", crop=RandomResizedCrop(224), **options).epoch(0)
    for _ in range(3):
        size = next(batches).images.nbytes
    before = getrusage(RUSAGE_SELF).ru_minflt
    count = sum(1 for _batch in batches)
    fresh = count * size / os.sysconf("SC_PAGE_SIZE")
    assert count == 7 and getrusage(RUSAGE_SELF).ru_minflt - before < fresh / 4


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("name", ALL)
def test_an_epoch_may_be_abandoned(make, name: str) -> None:
    loader = make(name, batch_size=2)
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
def test_close_ends_the_threads_and_unlocks_the_file(make, name: str) -> None:
    before = {t.name for t in threading.enumerate()}
    loader = make(name)
    next(loader.epoch(0))
    loader.close()
    # Threads that turn crops belong to the process, not to a loader.
    left = {t.name for t in threading.enumerate() if not t.name.startswith("rotate")}
    assert left <= before


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("name", engines("folder-beton", "dali-beton"))
def test_the_next_epoch_is_begun_before_it_is_asked_for(
    make, monkeypatch: pytest.MonkeyPatch, name: str, shuffle: bool
) -> None:
    engine = name.split("-")[0]
    source = "" if engine == "folder" else ".source"
    begun: set[int] = set()

    def noted(*args: object, epoch: int, **options: object) -> object:
        begun.add(epoch)
        return crop_boxes(*args, epoch=epoch, **options)  # type: ignore[arg-type]

    loader = make(name, shuffle=shuffle)
    monkeypatch.setattr(f"pipelines.engines.{engine}{source}.crop_boxes", noted)
    epoch = loader.epoch(0)
    for _ in range(len(loader)):
        next(epoch)
    epoch.close()  # at the last batch, as a training loop does
    opened = loader.source
    pool = opened._feed._runner if engine == "dali" else opened._pool
    pool.submit(int).result(30)  # behind everything that its only thread was given
    # Validation reads epoch 0 again and again; DALI's feed does not know, and discards.
    assert begun == ({0, 1} if shuffle or engine == "dali" else {0})
    assert served(epoch_of(loader, 1)) == served(epoch_of(make(name, shuffle=shuffle), 1))


@pytest.mark.parametrize("name", engines("folder-beton", "ffcv-beton", "dali-beton"))
def test_memory_does_not_grow_with_epochs(make, name: str) -> None:
    """Finished and abandoned epochs; a batch of 1.8 MB kept in each would be 36 MB."""
    loader = make(name, batch_size=12, max_samples=24, crop=RandomResizedCrop(224), workers=2)
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


@pytest.mark.skipif("dali" in MISSING, reason=MISSING.get("dali", ""))
def test_dali_is_given_what_a_crop_needs(make, tmp_path: Path) -> None:
    """And decodes the same pixels from it as from the whole image."""
    for i, image in enumerate(load_sample_images().images):
        save_jpeg(tmp_path / "d" / "x" / f"{i}.jpg", Image.fromarray(image), subsampling=2)
    write_beton(SampleIndex.from_folder(tmp_path / "d"), tmp_path / "d.beton", workers=1)
    options = {"batch_size": 2, "crop": RandomResizedCrop(64, scale=(0.08, 0.3))}
    part = make(f"dali-{tmp_path / 'd.beton'}", **options)
    whole = make(f"dali-{tmp_path / 'd'}", **options)
    for epoch in range(6):
        (ours,), (theirs,) = epoch_of(part, epoch), epoch_of(whole, epoch)
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.images, theirs.images)
    assert part.digest == whole.digest
    given, *_ = part.source._feed._batch(0, 0, np.arange(2))
    with Beton.open(tmp_path / "d.beton") as beton:
        assert sum(map(len, given)) < 0.6 * beton.sizes.sum()


@pytest.mark.skipif("dali" in MISSING, reason=MISSING.get("dali", ""))
def test_dali_resizes_while_the_consumer_works(make) -> None:
    source = make("dali-beton").source
    crops = source.epoch(0)
    held = next(crops)
    before = held.images.clone()
    (ahead,) = source._graph._ready
    done = ahead.result(30)  # nobody has asked for it
    assert done.place == (0, 1) and torch.equal(held.images, before)
    assert torch.equal(next(crops).images, done.images) and not torch.equal(done.images, before)


@pytest.mark.skipif("dali" in MISSING, reason=MISSING.get("dali", ""))
def test_dali_names_the_time_that_it_waited(make, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, stuck = make("dali-beton", timeout=0.6), threading.Event()
    monkeypatch.setattr("pipelines.engines.dali.source.splice_batch", lambda *_args: stuck.wait(60))
    try:
        with pytest.raises(TimeoutError, match="for 1 s"):
            epoch_of(loader)
        begin = time.monotonic()
        loader.close()  # waits neither for the feed, which is stuck, nor for ever
        assert time.monotonic() - begin < 20
    finally:
        stuck.set()


@pytest.mark.skipif("dali" in MISSING, reason=MISSING.get("dali", ""))
def test_dali_that_is_stuck_is_left_behind(make) -> None:
    loader, stuck, asked = make("dali-beton", timeout=0.6), threading.Event(), threading.Event()

    class Stuck:
        def run(self) -> None:
            asked.set()
            stuck.wait(60)

    loader.source._graph._pipe = Stuck()
    try:
        with pytest.raises(TimeoutError, match="no batch from DALI for 1 s"):
            epoch_of(loader)
        begin = time.monotonic()
        loader.close()
        assert asked.is_set() and time.monotonic() - begin < 20
    finally:
        stuck.set()


CROPS: dict[str, Crop] = {
    "random-resized": RandomResizedCrop(24),
    "random-padded": RandomCrop(24, padding=4),
    "random-resized-padded": RandomCrop(24, padding=6, resize=28),
    "random-resized-first": RandomCrop(24, padding=0, resize=30),
    "center-resized": CenterCrop(24, resize=28),
    "center-as-is": CenterCrop(24, resize=None),
    "center-larger-than-the-image": CenterCrop(90, resize=None),
    "center-larger-than-resized": CenterCrop(40, resize=32),
    "squash": Resize(24),
}


@pytest.mark.parametrize("crop", CROPS.values(), ids=CROPS)
@pytest.mark.parametrize("name", OTHERS)
def test_engines_agree(make, name: str, crop: Crop) -> None:
    reference = make("folder-folder", crop=crop)
    loader = make(name, crop=crop)
    for epoch in (0, 1):
        for ours, theirs in zip(epoch_of(reference, epoch), epoch_of(loader, epoch), strict=True):
            assert torch.equal(ours.indices, theirs.indices)
            assert torch.equal(ours.labels, theirs.labels)
            assert torch.equal(ours.valid, theirs.valid)
            far = (ours.images - theirs.images).abs()
            mean, most = MEASURED[name.split("-")[0]]
            assert far.mean((1, 2, 3)).max() <= mean and far.max() <= most
        assert loader.digest == reference.digest != 0
    assert loader.classes == reference.classes == ("a", "b", "c")


@pytest.mark.parametrize("name", REAL)
def test_the_number_of_workers_changes_no_pixel(make, name: str) -> None:
    one = make(name, workers=1, batch_size=18)
    many = make(name, workers=2, batch_size=18)
    more_than_cores = make(name, workers=5, batch_size=18)
    expected = epoch_of(one)
    assert equal(expected, epoch_of(many)) and equal(expected, epoch_of(more_than_cores))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of 32x32 as a beton, like CIFAR-10."""
    root = tmp_path_factory.mktemp("squares")
    for i in range(12):
        save_jpeg(root / "data" / "x" / f"{i:02}.jpg", smooth_image(100 + i, 32, 32))
    write_beton(SampleIndex.from_folder(root / "data"), root / "s.beton", workers=1)
    return root / "s.beton"


@pytest.mark.parametrize("name", engines("folder", "ffcv", "dali"))
def test_padded_crop_is_pillows(make, squares: Path, name: str) -> None:
    """The black border lies where Pillow puts it, and pixels inside are the image's own."""
    crop = RandomCrop(32, padding=4)
    loader = make(f"{name}-{squares}", crop=crop)
    with Beton.open(squares) as beton:
        payloads = [beton.payload(i).tobytes() for i in range(len(beton))]
    side = np.full(5, 32, np.int32)
    corners = set()
    for batch in epoch_of(loader):
        where = crop_boxes(
            loader.spec, epoch=0, indices=batch.indices.numpy(), heights=side, widths=side
        )
        for image, sample, box in zip(batch.images, batch.indices.tolist(), where, strict=True):
            top, left, height, width, flip = box.tolist()
            assert (height, width) == (32, 32)
            corners.add((top, left))
            padded = ImageOps.expand(_jpeg(payloads[sample]), 4)
            expected = padded.crop((left + 4, top + 4, left + 36, top + 36))
            if flip:
                expected = ImageOps.mirror(expected)
            wanted = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()
            # FFCV decodes with the fast DCT, a level or two beside libjpeg's default.
            assert (image - wanted).abs().max() <= (8 if name == "ffcv" else 0)
            border = torch.ones(32, 32, dtype=torch.bool)
            rows, columns = slice(max(-top, 0), min(32, 32 - top)), slice(max(-left, 0), 32 - left)
            border[rows, columns] = False
            border = border.flip(1) if flip else border
            assert not image[:, border].any() and image[:, ~border].amax(0).min() > 10
    assert len(corners) > 6


def _jpeg(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data)).convert("RGB")


@pytest.mark.parametrize("name", REAL)
def test_a_crop_larger_than_the_image_is_refused(make, name: str) -> None:
    with pytest.raises(Exception, match="too small for a crop of 500"):
        epoch_of(make(name, crop=RandomCrop(500, padding=4)))


@pytest.mark.parametrize("name", ALL)
def test_a_batch_larger_than_the_data_is_refused(make, name: str) -> None:
    with pytest.raises(ValueError, match="do not fill one global batch of 60"):
        make(name, batch_size=20, drop_last=True, shard=Shard(0, 3))
    (batch,) = epoch_of(make(name, batch_size=40))
    assert batch.valid.sum() == COUNT


@pytest.mark.parametrize("name", ALL)
def test_limit_takes_the_same_samples_everywhere(make, name: str) -> None:
    loader = make(name, max_samples=9, shuffle=False)
    expected = np.sort(permutation(COUNT, seed=0, epoch=-0x11317)[:9])
    assert served(epoch_of(loader)) == expected.tolist()


def test_engine_and_data_must_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engine=ffcv reads \.beton files; convert it"):
        open_loader(LoaderSpec(data=str(folder), engine="ffcv"))
    with pytest.raises(ValueError, match='"synthetic" needs engine synthetic, not folder'):
        open_loader(LoaderSpec(data="synthetic", engine="folder"))
    for engine in ("folder", *(e for e in ("ffcv", "dali") if e not in MISSING)):
        with pytest.raises(FileNotFoundError, match=r"none\.beton"):
            open_loader(LoaderSpec(data=str(tmp_path / "none.beton"), engine=engine))  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="none' is no folder, list file"):
        open_loader(LoaderSpec(data=str(tmp_path / "none"), engine="folder"))


@pytest.mark.skipif("dali" in MISSING, reason=MISSING.get("dali", ""))
def test_dali_cannot_mask_and_says_so(folder: Path) -> None:
    with pytest.raises(
        ValueError, match="cannot mask undecodable samples: max_undecodable must be 0"
    ):
        open_loader(LoaderSpec(data=str(folder), engine="dali", max_undecodable=1))


def test_auto_takes_the_best_present(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipelines.loader")
    missing: dict[str, str] = {}
    monkeypatch.setattr("pipelines.engines.choice._missing", missing.get)
    assert choose_engine(LoaderSpec()) == "synthetic"
    assert choose_engine(LoaderSpec(data="x.beton")) == "ffcv"
    assert "engine ffcv for x.beton: the fastest for a .beton file" in caplog.text
    assert choose_engine(LoaderSpec(data=str(folder))) == "dali"
    assert f"engine dali for {folder}: not ffcv: it reads .beton files only" in caplog.text
    assert choose_engine(LoaderSpec(data=str(folder), max_undecodable=1)) == "folder"
    assert choose_engine(LoaderSpec(data="x.beton"), raw=True) == "ffcv"
    missing["ffcv"] = "ffcv cannot be imported (no compiler)"
    assert choose_engine(LoaderSpec(data="x.beton"), raw=True) == "folder"
    missing["dali"] = "nvidia.dali cannot be imported (no wheel)"
    caplog.clear()
    assert choose_engine(LoaderSpec(data="x.beton")) == "folder"
    assert "not ffcv: ffcv cannot be imported (no compiler); not dali" in caplog.text
    with pytest.raises(ValueError, match=r"engine=ffcv: ffcv cannot be imported \(no compiler\)"):
        choose_engine(LoaderSpec(data="x.beton", engine="ffcv"))


def test_auto_opens_what_it_chose(folder: Path, beton: Path) -> None:
    for data in (folder, beton):
        spec = LoaderSpec(data=str(data), batch_size=4, crop=Resize(8))
        with open_loader(spec) as loader:
            assert loader.engine == choose_engine(spec)
            check_batch(next(loader.epoch(0)), views=4, batch_size=4, size=8)


@pytest.mark.parametrize("name", engines("folder", "dali"))
def test_a_list_file_is_a_data_set(make, folder: Path, name: str) -> None:
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*.jpg"))][:7]
    source = folder / f"list-{name}.txt"
    source.write_text("".join(f"{path} {5 + i}\n" for i, path in enumerate(names)))
    try:
        loader = make(f"{name}-{source}", shuffle=False, crop=Resize(16))
        batches = epoch_of(loader)
        labels = torch.cat([b.labels[b.valid] for b in batches]).tolist()
        assert labels == list(range(5, 12))
    finally:
        source.unlink()


ORIENTED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera stores an upright image under each orientation: the inverse of the repair."""


@pytest.fixture(scope="module")
def oriented(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Image.Image]:
    """One upright image, stored under every EXIF orientation, as a folder and as a beton."""
    root = tmp_path_factory.mktemp("oriented")
    upright = smooth_image(5, 40, 64)
    for tag in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = tag
        stored = upright.transpose(ORIENTED[tag]) if tag in ORIENTED else upright
        save_jpeg(root / "data" / "x" / f"{tag}.jpg", stored, exif=exif, quality=98)
    write_beton(SampleIndex.from_folder(root / "data"), root / "o.beton", workers=1)
    return root / "data", root / "o.beton", upright


@pytest.mark.parametrize("name", REAL)
def test_every_engine_serves_upright_images(
    make, oriented: tuple[Path, Path, Image.Image], name: str
) -> None:
    data, beton, upright = oriented
    engine, _, kind = name.partition("-")
    where = beton if kind == "beton" else data
    loader = make(
        f"{engine}-{where}", batch_size=8, crop=CenterCrop(40, None), flip=False, shuffle=False
    )
    (batch,) = epoch_of(loader)
    expected = torch.from_numpy(np.array(upright.crop((12, 0, 52, 40)))).permute(2, 0, 1).float()
    for tag, image in enumerate(batch.images, 1):
        assert (image - expected).abs().mean() < 4, f"orientation {tag}"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Seven images, one PNG among them, and one JPEG cut in half."""
    for i in range(7):
        save_jpeg(tmp_path / "d" / "x" / f"{i}.jpg", smooth_image(i, 60, 50))
    smooth_image(9, 33, 44).save(tmp_path / "d" / "x" / "8.png")
    broken = tmp_path / "d" / "x" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    return tmp_path / "d"


@pytest.mark.parametrize("name", engines("folder", "dali"))
def test_an_undecodable_file_stops_the_run_by_name(make, damaged: Path, name: str) -> None:
    with pytest.raises(ImageError, match=r"x/3\.jpg"):
        epoch_of(make(f"{name}-{damaged}", batch_size=2))


@pytest.mark.parametrize("name", engines("folder", "dali"))
def test_a_vanished_file_stops_the_run_by_name(make, damaged: Path, name: str) -> None:
    loader = make(f"{name}-{damaged}", batch_size=2, shuffle=False)
    for i in (0, 3):
        (damaged / "x" / f"{i}.jpg").unlink()
    with pytest.raises(ImageError, match=r"x/0\.jpg: a file that does not exist"):
        epoch_of(loader)


@pytest.mark.parametrize("name", engines("folder", "dali"))
def test_png_files_are_images_too(make, damaged: Path, name: str) -> None:
    (damaged / "x" / "3.jpg").unlink()
    loader = make(
        f"{name}-{damaged}", batch_size=7, shuffle=False, flip=False, crop=CenterCrop(30, None)
    )
    (batch,) = epoch_of(loader)
    expected = np.array(smooth_image(9, 33, 44).crop((7, 1, 37, 31)))
    assert np.array_equal(batch.images[6].permute(1, 2, 0).numpy(), expected)


def test_max_bad_masks_and_counts(make, damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = make(
        f"folder-{damaged}", batch_size=5, max_undecodable=1, views="rotate4", shuffle=False
    )
    for epoch in (1, 2):  # the budget is for one epoch
        batches = epoch_of(loader, epoch)
        assert served(batches) == [0, 1, 2, 4, 5, 6, 7] and loader.bad == epoch
        masked = batches[0]
        assert masked.valid.tolist() == [True, True, True, False, True] * 4
        assert (masked.targets == IGNORE).tolist() == (~masked.valid).tolist()
    assert "x/3.jpg" in caplog.text
    (damaged / "x" / "5.jpg").write_bytes(b"no image")
    with pytest.raises(
        ImageError, match=r"x/5\.jpg: .*2 undecodable this epoch, max_undecodable is 1"
    ):
        epoch_of(loader, 3)


def test_padding_does_not_count_as_bad(make, damaged: Path) -> None:
    """The last sample, repeated to fill the batch, is undecodable: that is one, not six."""
    (damaged / "x" / "8.png").rename(damaged / "x" / "0.png")
    (damaged / "x" / "3.jpg").rename(damaged / "x" / "9.jpg")
    loader = make(f"folder-{damaged}", batch_size=13, max_undecodable=1, shuffle=False)
    (batch,) = epoch_of(loader)
    assert loader.bad == 1 and batch.valid.sum() == 7


def test_where_dali_decodes_is_an_option_of_dali_only(beton: Path) -> None:
    spec = LoaderSpec(data=str(beton), engine="folder", batch_size=4, crop=Resize(8))
    with pytest.raises(ValueError, match="decoder=cpu is for engine=dali"):
        open_loader(replace(spec, decoder="cpu"))
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    with pytest.raises(ValueError, match="decoder=mixed decodes on a GPU"):
        open_loader(replace(spec, engine="dali", decoder="mixed"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hw_decoder_load": 0.0}, "hw_decoder_load=0 is for engine=dali .* folder decodes on"),
        ({"workers": 1, "cpu_budget": 0.5}, "cpu_budget=0.5 is for workers=0; workers=1 is"),
        *(
            ({"engine": "dali", "decoder": decoder, "hw_decoder_load": 0.5}, "a GPU and decoder=")
            for decoder in ("auto", "cpu")
            if "dali" not in MISSING
        ),
    ],
)
def test_an_option_that_would_not_be_read_is_refused(
    beton: Path, options: dict[str, object], words: str
) -> None:
    spec = LoaderSpec(data=str(beton), engine="folder", batch_size=4, crop=Resize(8))
    with pytest.raises(ValueError, match=words):
        open_loader(replace(spec, **options))


@pytest.mark.parametrize("name", engines("folder-beton", "dali-beton", "synthetic-none"))
def test_resizing_on_the_device_is_for_ffcv(make, name: str) -> None:
    with pytest.raises(ValueError, match=f"resize=device is for engine=ffcv; {name.split('-')[0]}"):
        make(name, resize="device")


def test_synthetic_needs_none_of_the_files_that_a_recipe_names() -> None:
    spec = LoaderSpec(data="nowhere/train.beton", engine="synthetic", batch_size=4, crop=Resize(8))
    with open_loader(spec) as loader:
        check_batch(next(loader.epoch(0)), views=4, batch_size=4, size=8)
