"""Nearest neighbours, against plain NumPy, ties included."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipelines.spec import CenterCrop, LoaderSpec
from rotpred.distributed import Rank
from rotpred.protocols import knn
from rotpred.recipes.base import FeatureRun
from rotpred.recipes.knn import Knn, in1k_knn
from rotpred.report.results import read_runs
from tests.support.references import knn_hits

pytestmark = pytest.mark.timeout(120)

KS = (1, 3, 10)

Rows = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def found(bank: Rows, queries: Rows, k: int, *, normalize: bool) -> tuple[torch.Tensor, ...]:
    return knn.neighbours(
        bank, queries, k=k, normalize=normalize, device=torch.device("cpu"), tick=lambda _: None
    )


def test_against_straight_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random features, several blocks of bank and queries, every number of neighbours."""
    monkeypatch.setattr(knn, "BANK_ROWS", 37)
    monkeypatch.setattr(knn, "QUERY_ROWS", 11)
    generator = np.random.default_rng(0)
    bank = generator.standard_normal((200, 16)).astype(np.float32)
    queries = generator.standard_normal((60, 16)).astype(np.float32)
    ids, truth = generator.integers(0, 9, 200), generator.integers(0, 9, 60)
    for cosine, temperature in ((True, 0.07), (False, 0.5)):
        counts = knn.count_hits(
            *found(bank, queries, max(KS), normalize=cosine),
            bank_labels=ids, labels=truth, ks=KS, temperature=temperature, classes=9,
        )  # fmt: skip
        expected = [knn_hits(bank, queries, ids, truth, k, temperature, cosine=cosine) for k in KS]
        assert counts.tolist() == expected
        assert 0 < counts[0, 0] < counts[-1, 1] < 60


@pytest.mark.parametrize("block", [7, 1000])
def test_ties_go_to_lower_rows_and_classes(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Small integers: similarities are exact, most are equal, some are negative."""
    monkeypatch.setattr(knn, "BANK_ROWS", block)
    generator = np.random.default_rng(1)
    bank = generator.integers(-1, 2, (90, 3)).astype(np.float32)
    queries = generator.integers(-1, 2, (40, 3)).astype(np.float32)
    ids, truth = generator.integers(0, 12, 90), generator.integers(0, 12, 40)
    similar, rows = found(bank, queries, 70, normalize=False)
    products = queries @ bank.T
    expected = np.argsort(-products, axis=1, kind="stable")[:, :70]
    np.testing.assert_array_equal(rows.numpy(), expected)
    np.testing.assert_array_equal(similar.numpy(), np.take_along_axis(products, expected, 1))
    assert (np.diff(similar.numpy()) == 0).any() and (similar < 0).any()
    temperature = float(1 / np.log(2))
    counts = knn.count_hits(
        similar, rows, bank_labels=ids, labels=truth, ks=(1,), temperature=temperature,
        classes=12,
    )  # fmt: skip
    assert counts[0].tolist() == knn_hits(bank, queries, ids, truth, 1, temperature, cosine=False)


def test_equal_votes_and_classes_without_votes() -> None:
    """With one vote each, the lower class comes first. Classes without votes are left out."""
    similar, rows = torch.tensor([[0.5, 0.5]] * 3), torch.tensor([[0, 1]] * 3)
    counts = knn.count_hits(
        similar, rows, bank_labels=np.array([4, 2]), labels=np.array([2, 4, 0]), ks=(2,),
        temperature=0.07, classes=6,
    )  # fmt: skip
    assert counts.tolist() == [[1, 2]]


def test_long_features_do_not_overflow() -> None:
    """VISSL's variant: dot products in the thousands, divided by a temperature of 0.1."""
    bank = np.array([[100.0, 0], [99, 0], [0, 100]], np.float32)
    similar, rows = found(bank, np.array([[50.0, 0]], np.float32), 3, normalize=False)
    assert similar[0].tolist() == [5000.0, 4950.0, 0.0]
    counts = knn.count_hits(
        similar, rows, bank_labels=np.array([1, 0, 0]), labels=np.array([1]), ks=(3,),
        temperature=0.1, classes=2,
    )  # fmt: skip
    assert counts.tolist() == [[1, 1]]


def recipe(beton: Path, tmp_path: Path) -> Knn:
    spec = LoaderSpec(
        data=str(beton), engine="folder", workers=1, batch_size=8, views="plain",
        crop=CenterCrop(32, 36), flip=False, shuffle=False, drop_last=False,
    )  # fmt: skip
    return Knn(
        weights="random", backbone="resnet18_tiny", train=spec, val=spec, neighbours=(1, 5),
        run=FeatureRun(str(tmp_path / "run"), "cpu"), cache=str(tmp_path / "cache"),
    )  # fmt: skip


def test_run_folder(beton: Path, tmp_path: Path) -> None:
    """Every sample is its own nearest neighbour: all are right at k = 1."""
    out = knn.run(recipe(beton, tmp_path), Rank())
    rows = {row["metric"]: row for row in json.loads((out / "results.json").read_text())}
    assert set(rows) == {"top1/k=1", "top1/k=5"}  # no top-5 with three classes
    assert rows["top1/k=1"]["value"] == 100.0 and rows["top1/k=1"]["n"] == 37
    assert (out / "done.json").exists()


def test_other_settings_take_the_place_of_the_earlier_ones(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results belong to the recipe in their folder; an interrupted run is not finished."""
    made = recipe(beton, tmp_path)
    out = knn.run(made, Rank())
    other = replace(made, neighbours=(3,), temperature=0.1, normalize=False)

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(knn, "neighbours", cut)
        knn.run(other, Rank())
    with pytest.raises(ValueError, match=r"not a run folder|unfinished"):
        read_runs(out)
    knn.run(other, Rank())
    (run,) = read_runs(out)
    assert [result.metric for result in run.results] == ["top1/k=3"]
    assert run.recipe["neighbours"] == [3]


def test_more_neighbours_than_samples_are_refused(beton: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot take 40 neighbours of 37 training samples"):
        knn.run(replace(recipe(beton, tmp_path), neighbours=(40,)), Rank())


def test_test_data_are_looked_at_before_the_work_on_training_data(
    beton: Path, tmp_path: Path
) -> None:
    made = recipe(beton, tmp_path)
    mistyped = replace(made, val=replace(made.val, data=str(tmp_path / "none.beton")))
    with pytest.raises(FileNotFoundError, match=r"none\.beton"):
        knn.run(mistyped, Rank())
    assert not (tmp_path / "cache").exists()


def test_the_published_settings() -> None:
    """docs/protocols.md: k 10 to 200, temperature 0.07, cosine, resize 256 and crop 224."""
    made = in1k_knn()
    assert (made.neighbours, made.temperature, made.normalize) == ((10, 20, 100, 200), 0.07, True)
    assert made.train.crop == made.val.crop == CenterCrop(224, 256)
