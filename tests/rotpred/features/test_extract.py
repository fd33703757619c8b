"""Feature extraction: exact rows in index order, on one process and on two."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from pipelines import storage
from pipelines.loader import open_loader
from pipelines.spec import CenterCrop, LoaderSpec
from rotpred import distributed
from rotpred.distributed import Rank
from rotpred.features import extract as extraction
from rotpred.features.base import Features
from rotpred.features.extract import extract, open_extraction_loader
from rotpred.models.base import Backbone
from rotpred.models.heads import stage_pools
from rotpred.models.names import AVGPOOL
from rotpred.protocols import knn, svm
from rotpred.protocols.multilabel import labels_of, read_labels
from rotpred.recipes.base import FeatureRun
from rotpred.recipes.knn import Knn
from rotpred.recipes.svm import LowShot, Svm
from rotpred.weights.frozen_backbone import load_frozen_backbone
from tests.support import processes

pytestmark = pytest.mark.timeout(120)

NAMES = ("stem", "res3", "res5", AVGPOOL)


def spec(beton: Path, **changes: object) -> LoaderSpec:
    base = LoaderSpec(
        data=str(beton), batch_size=8, views="plain", crop=CenterCrop(32, 36), flip=False,
        shuffle=False, drop_last=False, workers=1, engine="folder",
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def backbone_of(seed: int) -> Backbone:
    torch.manual_seed(seed)
    return load_frozen_backbone("resnet18_tiny", "random", Rank())[0]


def of(beton: Path, cache: Path, names: tuple[str, ...] = NAMES, **changes: object) -> Features:
    with open_extraction_loader(spec(beton, **changes), Rank(), "fp32") as loader:
        return extract(backbone_of(0), loader, Rank(), names=names, precision="fp32", cache=cache)


def test_equal_to_a_straight_forward_pass(beton: Path, tmp_path: Path) -> None:
    """Every stage of every sample, compared with one image at a time and torch's pooling layers."""
    found = of(beton, tmp_path)
    backbone = backbone_of(0)
    pools = stage_pools(backbone, 32)
    assert found.indices.tolist() == list(range(37))
    with open_loader(spec(beton, batch_size=1)) as loader, torch.no_grad():
        for i, batch in enumerate(loader.epoch(0)):
            maps = backbone.stages(batch.images)
            assert found.labels[i] == batch.labels[0]
            for stage in NAMES[:-1]:
                place = backbone.stage_names.index(stage)
                expected = pools[place](maps[place]).flatten().numpy()
                np.testing.assert_allclose(found.stages[stage][i], expected, rtol=1e-4, atol=1e-5)
            expected = maps[-1].mean((2, 3))[0].numpy()
            np.testing.assert_allclose(found.stages[AVGPOOL][i], expected, rtol=1e-4, atol=1e-5)
    assert i == 36


def test_files_are_found_again(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only missing stages are computed; other weights, crops or dtypes give other files."""
    computed: list[tuple[str, ...]] = []
    compute = extraction._compute

    def spy(*args: object) -> None:
        computed.append(tuple(args[3]))  # type: ignore[arg-type]
        compute(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(extraction, "_compute", spy)
    first = of(beton, tmp_path, ("res5",))
    again = of(beton, tmp_path, ("res5", AVGPOOL))
    assert computed == [("res5",), (AVGPOOL,)]
    np.testing.assert_array_equal(first.stages["res5"], again.stages["res5"])
    assert isinstance(again.stages["res5"], np.memmap) and not again.stages["res5"].flags.writeable
    of(beton, tmp_path, ("res5",), crop=CenterCrop(32, 40))
    of(beton, tmp_path, ("res5",), max_samples=9)
    with open_extraction_loader(spec(beton), Rank(), "fp32") as loader:
        extract(
            backbone_of(1), loader, Rank(), names=("res5",), precision="fp32", cache=tmp_path,
            store="float16",
        )  # fmt: skip
    assert len(computed) == 5
    assert {len(np.load(f)) for f in tmp_path.glob("*/labels.npy")} == {37, 9}
    assert not list(tmp_path.glob("*/.*.tmp"))


def test_an_interrupted_extraction_leaves_no_array(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, calls = backbone_of(0), 0
    stages = backbone.stages

    def failing(images: torch.Tensor) -> list[torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("the power went")
        return stages(images)

    monkeypatch.setattr(backbone, "stages", failing)
    with (
        open_extraction_loader(spec(beton), Rank(), "fp32") as loader,
        pytest.raises(RuntimeError, match="the power went"),
    ):
        extract(backbone, loader, Rank(), names=("res5",), precision="fp32", cache=tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {".lock"}


@pytest.fixture
def entry(beton: Path, tmp_path: Path) -> Path:
    """A feature folder; tests request the same features in another cache."""
    of(beton, tmp_path / "twin", ("res5",))
    (folder,) = (tmp_path / "twin").iterdir()
    return folder


def test_arrays_that_would_not_fit_are_not_begun(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of two stages, label and index, with padding; the margin equals that of checkpoints."""
    names = ("res5", "res3")
    row = sum(array.shape[1] * 4 for array in of(beton, tmp_path / "a", names).stages.values()) + 16
    enough = 40 * row + 40 * row // 50 + 2**20
    disk = types.SimpleNamespace(free=enough - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    words = r"^no space for res5, res3 of 40 images as float32 in \S+: needs \d MB, \d MB are free$"
    with pytest.raises(ValueError, match=words):
        of(beton, tmp_path / "b", names)
    assert [path.name for path in (tmp_path / "b").glob("*/*")] == [".lock"]
    disk.free = enough
    of(beton, tmp_path / "b", names)


def test_a_second_job_waits_and_computes_nothing(
    beton: Path, entry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of killed jobs are removed only while holding the lock."""
    folder = tmp_path / "cache" / entry.name
    folder.mkdir(parents=True)
    left = folder / ".res5.npy.4194305.tmp"
    left.write_bytes(b"half")
    said, waiting = [], threading.Event()

    def info(words: str, *values: object) -> None:
        said.append(words % values)
        waiting.set()

    def fail(*_: object) -> None:
        raise AssertionError("the other job has computed them")

    monkeypatch.setattr(extraction, "_compute", fail)
    monkeypatch.setattr(storage.logger, "info", info)
    with ThreadPoolExecutor(1) as threads, (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 7 on elsewhere")
        lock.flush()
        second = threads.submit(of, beton, tmp_path / "cache", ("res5",))
        assert waiting.wait(60)
        assert left.exists() and not second.done()
        for file in entry.glob("*.npy"):
            shutil.copy(file, folder)
        fcntl.flock(lock, fcntl.LOCK_UN)
        found = second.result(60)
    assert said == [f"{folder} is in use by process 7 on elsewhere: waiting for it"]
    np.testing.assert_array_equal(found.stages["res5"], np.load(entry / "res5.npy"))
    assert not left.exists()


def refuse(beton: Path, folder: Path) -> int:
    """One of two processes: both raise the error that only rank 0 sees."""
    looked: list[str] = []
    exists = Path.exists

    def spy(path: Path, **options: bool) -> bool:
        looked.append(path.name)
        return exists(path, **options)

    with distributed.process_group("cpu", timeout_seconds=60) as rank:
        Path.exists = spy  # type: ignore[assignment,method-assign]
        try:
            with open_extraction_loader(spec(beton), rank, "fp32") as images:
                extract(
                    backbone_of(0), images, rank, names=("res5",), precision="fp32", cache=folder
                )
        except ValueError as error:
            said = {"error": str(error), "looked": "res5.npy" in looked}
            (folder / f"{rank.rank}.json").write_text(json.dumps(said))
            return 0
    return 1


def test_a_second_job_of_several_processes_is_refused(
    beton: Path, entry: Path, tmp_path: Path
) -> None:
    folder, console = tmp_path / "cache", tmp_path / "console"
    (folder / entry.name).mkdir(parents=True)
    with (folder / entry.name / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ends = processes.run(refuse, beton, folder, console=console, world=2)
    assert ends == [0, 0], console.read_text()
    said = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert "is in use by another process" in said[0]["error"]
    assert said[0]["error"] == said[1]["error"]
    assert [one["looked"] for one in said] == [True, False]


def test_chance_and_unknown_stages_are_refused(beton: Path, tmp_path: Path) -> None:
    for change in ({"flip": True}, {"shuffle": True}, {"drop_last": True}, {"views": "rotate4"}):
        with pytest.raises(ValueError, match="every image once"):
            of(beton, tmp_path, **change)
    with pytest.raises(ValueError, match=r"has no stage .*layer4.*: it has stem, res2"):
        of(beton, tmp_path, ("layer4",))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake download server: a generated file named by its checksum, and an empty TORCH_HOME."""
    torch.manual_seed(5)
    made = tmp_path / "made.pth"
    torch.save(torchvision.models.resnet18().state_dict(), made)
    path = tmp_path / f"resnet18-{hashlib.sha256(made.read_bytes()).hexdigest()[:8]}.pth"
    made.rename(path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    known = types.SimpleNamespace(url=path.as_uri())
    monkeypatch.setattr(torchvision.models, "get_weight", lambda _: known)
    return path


def test_supervised_weights_come_from_torchvision(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "home" / "hub" / "checkpoints" / published.name
    for _ in range(2):
        backbone, sha = load_frozen_backbone("resnet18", "imagenet", Rank())
        assert sha == hashlib.sha256(kept.read_bytes()).hexdigest()
        theirs = torch.load(published, weights_only=True)
        assert all(torch.equal(v, theirs[k]) for k, v in backbone.state_dict().items())
        assert not backbone.training
        monkeypatch.delattr(torch.hub, "download_url_to_file", raising=False)  # the file is kept
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged: remove it"):
        load_frozen_backbone("resnet18", "imagenet", Rank())


def test_supervised_weights_that_cannot_be_had(published: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no supervised weights for nin3 \(only resnet18, resnet50\)"
    ):
        load_frozen_backbone("nin3", "imagenet", Rank())
    content = published.read_bytes()
    published.write_bytes(content[1:])
    with pytest.raises(
        ValueError, match=r"invalid hash value.* give --weights FILE or --weights r"
    ):
        load_frozen_backbone("resnet18", "imagenet", Rank())
    published.unlink()
    with pytest.raises(
        ValueError, match=rf"No such file.*save file://.*{published.name} as .*home"
    ):
        load_frozen_backbone("resnet18", "imagenet", Rank())
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_labels_by_index(beton: Path, tmp_path: Path) -> None:
    """max_samples selects label rows by sample, not by position."""
    table = np.random.default_rng(0).integers(-1, 2, (37, 4)).astype(np.int8)
    path = tmp_path / "labels.npy"
    np.save(path, table)
    found = of(beton, tmp_path, (AVGPOOL,), max_samples=9)
    assert len(found.indices) == 9 and found.indices[-1] > 8
    read = read_labels(str(path), total=37)
    np.testing.assert_array_equal(labels_of(found, read, 4), table[found.indices])
    against = labels_of(found, None, 3)
    assert (against.sum(1) == -1).all() and (against.argmax(1) == found.labels).all()
    np.save(path, table.astype(np.int64))
    with pytest.raises(ValueError, match="expected int8"):
        read_labels(str(path), total=37)


def test_a_file_that_holds_no_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.pt"
    for value in (torch.zeros(3, 2, dtype=torch.int8), "1 -1"):
        torch.save(value, path)
        with pytest.raises(ValueError, match=r"labels\.pt is not an \.npy file of int8"):
            read_labels(str(path), total=3)
    np.save(path, np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"is not an \.npy file"):
        read_labels(f"{path}.npy", total=1)


def test_work_is_shared_without_gaps() -> None:
    for world in (1, 2, 3, 8):
        parts = [list(range(5))[Rank(rank=r, world=world).part_of(5)] for r in range(world)]
        assert [unit for part in parts for unit in part] == list(range(5))


def evaluate_features(folder: Path) -> int:
    """One of one or two processes: SVMs, low-shot SVMs and neighbours on the same images."""
    with distributed.process_group("cpu", timeout_seconds=60) as rank:
        data = spec(folder / "data.beton")

        def place(name: str) -> FeatureRun:
            return FeatureRun(str(folder / f"{name}{rank.world}"), "cpu")

        common: dict[str, Any] = {
            "weights": "random", "backbone": "resnet18_tiny", "train": data, "val": data,
            "cache": str(folder / f"cache{rank.world}"),
        }  # fmt: skip
        costs = (1.0, 0.01)
        svm.run(Svm(run=place("svm"), stages=("res5", "avgpool"), costs=costs, **common), rank)
        few = LowShot(
            run=place("few"), stages=("avgpool",), costs=costs, shots=(1, 3), draws=3, **common
        )
        svm.run_low_shot(few, rank)
        knn.run(Knn(run=place("knn"), neighbours=(3, 7), **common), rank)
    return 0


@pytest.mark.timeout(300)
def test_two_processes_get_what_one_gets(beton: Path, tmp_path: Path) -> None:
    """37 samples in batches of 2 x 8, so the last rank pads; arrays and results are equal."""
    (tmp_path / "data.beton").write_bytes(beton.read_bytes())
    console = tmp_path / "console"
    for world in (1, 2):
        status = processes.run(evaluate_features, tmp_path, console=console, world=world)
        assert status == [0] * world, console.read_text()[-3000:]
    first, second = (sorted((tmp_path / f"cache{world}").rglob("*.npy")) for world in (1, 2))
    assert [p.name for p in first] == [p.name for p in second] and len(first) == 4
    for one, two in zip(first, second, strict=True):
        np.testing.assert_allclose(np.load(one), np.load(two), rtol=1e-4, atol=1e-6)
    for name in ("svm", "few", "knn"):
        one_rows, two_rows = (
            {
                row["metric"]: row["value"]
                for row in json.loads((tmp_path / f"{name}{world}" / "results.json").read_text())
            }
            for world in (1, 2)
        )
        assert one_rows == pytest.approx(two_rows, abs=1e-3), name
