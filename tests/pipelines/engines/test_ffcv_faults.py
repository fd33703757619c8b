"""Faults of stock FFCV: stock FFCV shows each one, `pipelines.engines.ffcv.source` does not.

The stock loader runs in a separate process, because it hangs and leaks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

from pipelines.batch import IGNORE, Batch
from pipelines.beton.reader import Beton
from pipelines.conversion.convert import write_beton
from pipelines.datasets.index import SampleIndex
from pipelines.imaging.decode import ImageError
from pipelines.loader import Loader, open_loader
from pipelines.spec import CenterCrop, LoaderSpec, Normalize, RandomResizedCrop
from tests.support.engines import engine_module
from tests.support.images import save_jpeg, smooth_image

engine = engine_module("ffcv", "source")

pytestmark = pytest.mark.timeout(200)

ROOT = Path(__file__).parents[3]
COUNT, BATCH, SIDE = 24, 4, 32
DAMAGED, BEFORE = 14, 2
"""With one batch ahead, stock FFCV has three slots: sample 14 reuses the buffer of sample 2."""

STOCK = r"""
import json, sys, threading, time, torch
torch.set_num_threads(3)
import numba, ffcv
from dataclasses import replace
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
from ffcv.pipeline.operation import Operation
from ffcv.transforms import ToTensor

good, damaged = sys.argv[1:]
seen = {"threads_after_import": torch.get_num_threads()}

class Raises(Operation):
    def declare_state_and_memory(self, state):
        return replace(state, jit_mode=False), None
    def generate_code(self):
        calls = []
        def broken(images, _memory):
            calls.append(0)
            if len(calls) == 4:
                raise RuntimeError("broken on purpose")
            return images
        return broken

def loader(path, decoder, *more):
    torch.set_num_threads(3)
    return ffcv.Loader(path, batch_size=4, num_workers=1, batches_ahead=1, seed=0,
                       pipelines={"image": [decoder, *more, ToTensor()], "label": None})

bytes_type = numba.uint8[::1]
centre = loader(damaged, CenterCropRGBImageDecoder((32, 32), 1.0))
torch.set_num_threads(3)
kept, copies = [], []
for (images,) in centre:
    kept.append(images)
    copies.append(images.clone())
seen["threads_after_epoch"] = torch.get_num_threads()
seen["numba_type_changed"] = not bytes_type.mutable
seen["kept_batches_that_changed"] = sum(
    not torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
everything = torch.cat(copies)
seen["damaged_equals_earlier"] = torch.equal(everything[14], everything[2])
seen["damaged_is_blank"] = not everything[14].any().item()

before = threading.active_count()
for _ in range(5):
    for _batch in centre:
        break
time.sleep(2)
seen["threads_leaked"] = threading.active_count() - before

epochs = []
for _ in range(2):
    random = loader(good, RandomResizedCropRGBImageDecoder((32, 32)))
    epochs.append(torch.cat([images.clone() for (images,) in random]))
seen["same_seed_same_pixels"] = torch.equal(*epochs)

raising = iter(loader(good, CenterCropRGBImageDecoder((32, 32), 1.0), Raises()))
got = []
def consume():
    for _ in raising:
        got.append(time.monotonic())
consumer = threading.Thread(target=consume, daemon=True)
consumer.start()
raising.join()
consumer.join(6)
seen["batches_before_error"] = len(got)
seen["hangs"] = consumer.is_alive()
print(json.dumps(seen), flush=True)
import os
os._exit(0)
"""


@pytest.fixture(scope="module")
def square_beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of one size, so that a stale buffer shows a complete other image."""
    root = tmp_path_factory.mktemp("faults")
    for i in range(COUNT):
        save_jpeg(root / "data" / "x" / f"{i:02}.jpg", smooth_image(i, 48, 48))
    write_beton(SampleIndex.from_folder(root / "data"), root / "good.beton", workers=1)
    return root / "good.beton"


def zeroed(beton: Path, sample: int, name: str) -> Path:
    """A copy in which the bytes of one image are zeroed, without its manifest."""
    copy = beton.with_name(name)
    shutil.copy(beton, copy)
    with Beton.open(beton) as opened, copy.open("r+b") as file:
        file.seek(int(opened.offsets[sample]))
        file.write(bytes(int(opened.sizes[sample])))
    return copy


@pytest.fixture(scope="module")
def damaged_beton(square_beton: Path) -> Path:
    return zeroed(square_beton, DAMAGED, "damaged.beton")


@pytest.fixture(scope="module")
def stock(square_beton: Path, damaged_beton: Path) -> dict[str, Any]:
    """What the stock loader reported for the two files."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STOCK, str(square_beton), str(damaged_beton)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def spec_of(data: Path, **options: object) -> LoaderSpec:
    defaults: dict[str, object] = {
        "data": str(data),
        "engine": "ffcv",
        "batch_size": BATCH,
        "crop": CenterCrop(SIDE, 48),
        "views": "plain",
        "normalize": Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        "flip": False,
        "shuffle": False,
        "workers": 1,
    }
    return LoaderSpec(**{**defaults, **options})  # type: ignore[arg-type]


@pytest.fixture
def loader(square_beton: Path) -> Iterator[Loader]:
    with open_loader(spec_of(square_beton)) as opened:
        yield opened


def ffcv_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if isinstance(t, engine.DecodingThread)]


def break_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    real = engine.RingLoader.decode

    def broken(self: Any, step: engine.Step, number: int) -> Any:
        if step.step == batch:
            raise RuntimeError("broken on purpose")
        return real(self, step, number)

    monkeypatch.setattr(engine.RingLoader, "decode", broken)


def test_stock_waits_forever_for_a_dead_thread(stock: dict[str, Any]) -> None:
    assert stock["hangs"] and stock["batches_before_error"] == 3


def test_an_error_in_the_thread_arrives(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(loader.epoch(0))
    with monkeypatch.context() as patch:
        break_at(patch, 3)
        got, begin = [], time.monotonic()
        with pytest.raises(RuntimeError, match="broken on purpose") as caught:
            for batch in loader.epoch(0):
                got.append(batch)
        assert len(got) == 3 and time.monotonic() - begin < 5
        frames = [f.name for f in traceback.extract_tb(caught.value.__traceback__)]
        assert frames[-1] == "broken" and "run" in frames  # the traceback of the thread
    assert not ffcv_threads()
    again = list(loader.epoch(0))
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole, again, strict=True))


def test_a_thread_that_ends_silently_is_noticed(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.DecodingThread, "run", lambda _self: None)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="thread ended without an error"):
        next(loader.epoch(0))
    assert time.monotonic() - begin < 5


def test_a_stuck_thread_runs_into_the_timeout(
    square_beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    real = engine.RingLoader.decode

    def stuck(self: Any, step: engine.Step, number: int) -> Any:
        if step.step == 2:
            release.wait()
        return real(self, step, number)

    with open_loader(spec_of(square_beton, timeout=1.0)) as loader:
        with monkeypatch.context() as patch:
            patch.setattr(engine.RingLoader, "decode", stuck)
            batches = loader.epoch(0)
            assert len([next(batches), next(batches)]) == 2
            begin = time.monotonic()
            with pytest.raises(TimeoutError, match="no batch from FFCV's loader thread for 1 s"):
                next(batches)
            assert 0.9 < time.monotonic() - begin < 4
            # Its buffers are still being written: no second thread may use them.
            with pytest.raises(RuntimeError, match="earlier epoch is stuck"):
                next(loader.epoch(0))
        release.set()
        assert len(list(loader.epoch(0))) == 6
    assert not ffcv_threads()


def test_stock_shows_another_image_for_a_damaged_one(stock: dict[str, Any]) -> None:
    assert stock["damaged_equals_earlier"] and not stock["damaged_is_blank"]


def test_a_damaged_image_is_blank_and_not_valid(
    loader: Loader, damaged_beton: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = list(loader.epoch(0))
    with open_loader(spec_of(damaged_beton, max_undecodable=1)) as damaged:
        for epoch in (1, 2):
            batches = list(damaged.epoch(epoch))
            assert damaged.source.decode_errors.total == epoch
            images = torch.cat([b.images for b in batches])
            valid = torch.cat([b.valid for b in batches])
            targets = torch.cat([b.targets for b in batches])
            expected = torch.cat([b.images for b in whole])
            assert (~valid).nonzero().flatten().tolist() == [DAMAGED]
            assert targets[DAMAGED] == IGNORE and not images[DAMAGED].any()
            expected[DAMAGED] = 0
            assert torch.equal(images, expected)
    assert f"masked {damaged_beton}: sample {DAMAGED}" in caplog.text


def test_a_damaged_image_over_the_budget_is_named(damaged_beton: Path) -> None:
    with (
        open_loader(spec_of(damaged_beton)) as loader,
        pytest.raises(
            ImageError, match=rf"damaged\.beton: sample {DAMAGED}: .*max_undecodable is 0"
        ),
    ):
        list(loader.epoch(0))
    assert not ffcv_threads()


def test_padding_does_not_count_as_undecodable(square_beton: Path) -> None:
    """The undecodable last sample is repeated to fill the batch: it counts once, not twelvefold."""
    copy = zeroed(square_beton, COUNT - 1, "last.beton")
    with open_loader(spec_of(copy, max_undecodable=1, batch_size=35, drop_last=False)) as loader:
        (batch,) = loader.epoch(0)
        assert loader.source.decode_errors.total == 1 and batch.valid.sum() == COUNT - 1


def test_a_mere_warning_of_the_decoder_is_no_damage(
    square_beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFCV's return code covers warnings too, so another decoder decides."""
    asked = []
    real = engine.FfcvSource._decode_with_torchvision

    def spy(self: Any, item: engine.DecodedBatch, i: int) -> bool:
        asked.append(int(item.step.indices[i]))
        return real(self, item, i)

    monkeypatch.setattr(engine.FfcvSource, "_decode_with_torchvision", spy)
    copy = square_beton.with_name("warned.beton")
    shutil.copy(square_beton, copy)
    with Beton.open(square_beton) as beton, copy.open("r+b") as file:
        middle = int(beton.offsets[5] + beton.sizes[5]) - 60
        file.seek(middle)
        # An undeclared restart marker: libjpeg warns and continues to decode.
        file.write(b"\xff\xd3")
    served = {}
    for name in ("ffcv", "folder"):
        with open_loader(spec_of(copy, engine=name)) as loader:
            served[name] = list(loader.epoch(0))
            assert loader.source.decode_errors.total == 0
    assert asked == [5]
    assert all(b.valid.all() for b in served["ffcv"])
    assert torch.equal(served["ffcv"][1].images[1], served["folder"][1].images[1])


def test_stock_changes_types_that_numba_shares(stock: dict[str, Any]) -> None:
    assert stock["numba_type_changed"]


def test_numba_keeps_its_array_types(loader: Loader) -> None:
    shared = [numba.uint8[::1], numba.uint8[:, ::1], numba.uint32[::1], numba.uint64[::1]]
    assert len(list(loader.epoch(0))) == 6
    assert [kind.mutable for kind in shared] == [True] * 4


def test_stock_overwrites_kept_batches(stock: dict[str, Any]) -> None:
    assert stock["kept_batches_that_changed"] >= 2


def test_kept_batches_do_not_change(loader: Loader) -> None:
    kept, copies = [], []
    for batch in loader.epoch(0):
        kept.append(batch)
        copies.append(Batch(*(t.clone() for t in batch)))
    assert len(kept) == 6
    for one, two in zip(kept, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_stock_leaks_a_thread_for_every_early_break(stock: dict[str, Any]) -> None:
    assert stock["threads_leaked"] == 5


def test_an_early_break_leaves_no_thread(loader: Loader) -> None:
    before = threading.active_count()
    for _ in range(20):
        for _batch in loader.epoch(0):
            break
        assert not ffcv_threads()  # at once, not at garbage collection
    assert threading.active_count() == before
    with pytest.raises(ZeroDivisionError):
        for _batch in loader.epoch(0):
            1 / 0  # noqa: B018  (the consumer fails)
    assert len(list(loader.epoch(0))) == 6


def test_a_new_epoch_ends_the_one_that_was_left(loader: Loader) -> None:
    left = loader.epoch(0)
    next(left)
    assert len(list(loader.epoch(1))) == 6 and not ffcv_threads()


def test_stock_sets_torch_to_its_own_number_of_threads(stock: dict[str, Any]) -> None:
    assert stock["threads_after_import"] == 1 and stock["threads_after_epoch"] == 1


def test_torch_keeps_its_threads(square_beton: Path) -> None:
    code = (
        "import sys, torch; torch.set_num_threads(3)\n"
        "from pipelines.engines.choice import missing_engines\n"
        "from pipelines.loader import open_loader\n"
        "from pipelines.spec import CenterCrop, LoaderSpec\n"
        "missing_engines(); import pipelines.engines.ffcv.source\n"
        "assert torch.get_num_threads() == 3, 'import'\n"
        "spec = LoaderSpec(data=sys.argv[1], engine='ffcv', batch_size=4, workers=1,\n"
        "                  crop=CenterCrop(32, 48))\n"
        "with open_loader(spec) as loader:\n"
        "    assert torch.get_num_threads() == 3, 'open'\n"
        "    for epoch in (0, 1):\n"
        "        for _ in loader.epoch(epoch): assert torch.get_num_threads() == 3, 'iterate'\n"
        "assert torch.get_num_threads() == 3, 'close'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(square_beton)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_stock_augments_differently_under_one_seed(stock: dict[str, Any]) -> None:
    assert not stock["same_seed_same_pixels"]


def test_one_seed_gives_one_epoch_for_any_number_of_workers(square_beton: Path) -> None:
    runs = []
    for workers in (1, 1, 2):
        options = {"crop": RandomResizedCrop(SIDE), "flip": True, "shuffle": True}
        with open_loader(spec_of(square_beton, workers=workers, **options)) as loader:
            runs.append(torch.cat([b.images for b in loader.epoch(3)]))
            other = torch.cat([b.images for b in loader.epoch(4)])
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], other)


def test_a_file_replaced_in_mid_epoch_is_read_to_its_end(
    square_beton: Path, damaged_beton: Path, tmp_path: Path
) -> None:
    file = tmp_path / "f.beton"
    shutil.copy(square_beton, file)
    with open_loader(spec_of(file)) as loader:
        whole = torch.cat([b.images for b in loader.epoch(0)])
        batches = loader.epoch(0)
        images = [next(batches).images]
        shutil.copy(damaged_beton, tmp_path / "new")
        os.replace(tmp_path / "new", file)
        images += [b.images for b in batches]
        assert torch.equal(torch.cat(images), whole)


def test_an_epoch_allocates_no_dictionaries_per_sample(loader: Loader) -> None:
    """The kernel reads the arrays of the beton directly: memory does not grow with the data set."""
    source: Any = loader.source
    tables = source._loader.tables.state
    beton = source._beton
    mine = (beton.data, beton.offsets, beton.sizes, beton.heights, beton.widths, beton.modes)
    assert all(a is b for a, b in zip(tables, mine, strict=False))
