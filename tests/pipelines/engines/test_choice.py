"""Choice of an engine, and options that an engine refuses."""

from __future__ import annotations

import fcntl
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.engines.choice import choose_engine
from pipelines.loader import open_loader
from pipelines.spec import (
    Engine,
    LoaderSpec,
    Resize,
)
from tests.support.batches import check_batch
from tests.support.engines import engines

pytestmark = pytest.mark.timeout(120)


def test_engine_and_data_must_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engine=ffcv reads \.beton files; convert it"):
        open_loader(LoaderSpec(data=str(folder), engine="ffcv"))
    with pytest.raises(ValueError, match='"synthetic" needs engine synthetic, not folder'):
        open_loader(LoaderSpec(data="synthetic", engine="folder"))
    with pytest.raises(FileNotFoundError, match="none' is not a folder, list file"):
        open_loader(LoaderSpec(data=str(tmp_path / "none"), engine="folder"))


@pytest.mark.parametrize("engine", engines("folder", "ffcv", "dali"))
def test_a_beton_that_is_not_there_is_named(tmp_path: Path, engine: Engine) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.beton"):
        open_loader(LoaderSpec(data=str(tmp_path / "none.beton"), engine=engine))


def test_auto_takes_the_best_present(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipelines.engines.choice")
    missing: dict[str, str] = {}
    monkeypatch.setattr("pipelines.engines.choice.missing_reason", missing.get)
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


def test_where_dali_decodes_is_an_option_of_dali_only(beton: Path) -> None:
    spec = LoaderSpec(data=str(beton), engine="folder", batch_size=4, crop=Resize(8))
    with pytest.raises(ValueError, match="decoder=cpu is for engine=dali"):
        open_loader(replace(spec, decoder="cpu"))


@pytest.mark.dali
def test_dali_decodes_on_a_gpu_only_where_there_is_one(beton: Path) -> None:
    spec = LoaderSpec(data=str(beton), engine="dali", batch_size=4, crop=Resize(8))
    with pytest.raises(ValueError, match="decoder=mixed decodes on a GPU"):
        open_loader(replace(spec, decoder="mixed"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hw_decoder_load": 0.0}, "hw_decoder_load=0 is for engine=dali .* folder decodes on"),
        (
            {"workers": 1, "cpu_budget": 0.5},
            "cpu_budget=0.5 is for workers=0; workers=1 is already",
        ),
        *(
            pytest.param(
                {"engine": "dali", "decoder": decoder, "hw_decoder_load": 0.5},
                "a GPU and decoder=",
                marks=pytest.mark.dali,
            )
            for decoder in ("auto", "cpu")
        ),
    ],
)
def test_an_option_that_would_not_be_read_is_refused(
    beton: Path, options: dict[str, object], words: str
) -> None:
    spec = LoaderSpec(data=str(beton), engine="folder", batch_size=4, crop=Resize(8))
    with pytest.raises(ValueError, match=words) as refused:
        open_loader(replace(spec, **options))
    assert refused.tb is not None  # Its frames keep the beton alive: closed, not collected.
    with beton.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("name", engines("folder-beton", "dali-beton", "synthetic-none"))
def test_resizing_on_the_device_is_for_ffcv(open_engine, name: str) -> None:
    with pytest.raises(ValueError, match=f"resize=device is for engine=ffcv; {name.split('-')[0]}"):
        open_engine(name, resize="device")


def test_synthetic_needs_none_of_the_files_that_a_recipe_names() -> None:
    spec = LoaderSpec(data="nowhere/train.beton", engine="synthetic", batch_size=4, crop=Resize(8))
    with open_loader(spec) as loader:
        check_batch(next(loader.epoch(0)), views=4, batch_size=4, size=8)
