"""Fields that check themselves: types, choices, ranges; what is converted, and what is not."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest

from pipelines import open_dense, open_images, open_loader
from pipelines.checks import DISTINCT, NOT_EMPTY, Checked, NonNegativeFloat, at_least, check
from pipelines.dense.spec import DenseSpec
from pipelines.spec import LoaderSpec, RandomCrop, RandomResizedCrop
from tests.support.images import gradient_image, save_jpeg

Inner = Annotated[int, at_least(1)]


@dataclass(frozen=True)
class Base(Checked):
    count: Inner | None = None
    rates: Annotated[tuple[NonNegativeFloat, ...], NOT_EMPTY, DISTINCT] = (0.1,)


@dataclass(frozen=True)
class Derived(Base):
    kind: Literal["mean", "maximum", "last"] = "mean"
    base: Base | None = None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"count": 0}, "Derived.count must be at least 1, got 0"),
        ({"count": "1"}, "Derived.count must be a whole number or None, got '1'"),
        ({"count": True}, "Derived.count must be a whole number or None, got True"),
        ({"rates": ()}, "Derived.rates must not be empty and not repeat a value, got ()"),
        ({"rates": (1, 1)}, "Derived.rates must not be empty and not repeat a value, got (1, 1)"),
        ({"rates": (1, -1)}, "Derived.rates[1] must be at least 0, got -1"),
        ({"rates": (float("inf"),)}, "Derived.rates[0] must be a finite number, got inf"),
        ({"rates": 0.1}, "Derived.rates must be a tuple, each value a finite number, got 0.1"),
        (
            {"kind": "maxmum"},
            "Derived.kind must be mean, maximum or last, got 'maxmum': did you mean maximum?",
        ),
        ({"kind": ["mean"]}, "Derived.kind must be mean, maximum or last, got ['mean']"),
        ({"base": 3}, "Derived.base must be Base or None, got 3"),
    ],
)
def test_a_wrong_value_is_one_clear_error(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError) as met:
        Derived(**values)  # type: ignore[arg-type]
    assert str(met.value) == words
    with pytest.raises(ValueError, match="Derived"):
        replace(Derived(), **values)  # type: ignore[arg-type]


def test_numbers_of_numpy_and_lists_become_plain_values() -> None:
    made = Base(count=np.int64(3), rates=[np.float32(0.5), np.int32(2)])  # type: ignore[arg-type]
    assert repr(made) == "Base(count=3, rates=(0.5, 2))"
    assert json.loads(json.dumps(asdict(made))) == {"count": 3, "rates": [0.5, 2]}


def test_whole_numbers_stay_whole_where_a_float_is_meant() -> None:
    """Recipes are compared as JSON when a run resumes."""
    assert repr(Base(rates=(1, 0.5))) == "Base(count=None, rates=(1, 0.5))"


def test_a_spec_survives_replace_and_pickling() -> None:
    spec = replace(LoaderSpec(data="x.beton"), seed=3)
    assert pickle.loads(pickle.dumps(spec)) == spec and hash(spec) == hash(replace(spec))


def test_a_path_is_welcome_as_data(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/2.jpg"):
        save_jpeg(tmp_path / name, gradient_image())
    spec = LoaderSpec(data=tmp_path, engine="folder", crop=RandomCrop(8), batch_size=2)  # type: ignore[arg-type]
    assert spec == replace(spec, data=str(tmp_path)) and type(spec.data) is str
    with open_loader(spec) as loader:
        assert next(loader.epoch(0)).images.shape == (8, 3, 8, 8)
    assert len(open_images(tmp_path)) == 2


def test_arguments_of_functions_are_checked_with_the_same_words() -> None:
    words = r"^precision must be fp32, bf16 or fp16, got 'float16'$"
    with pytest.raises(ValueError, match=words):
        open_loader(LoaderSpec(), precision="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        open_dense(DenseSpec(), precision="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^spec must be LoaderSpec, got 'images'$"):
        open_loader("images")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^split must be train or val, got 'test'$"):
        open_images("digits", split="test")  # type: ignore[arg-type]


def test_the_largest_seed_is_usable(folder: Path) -> None:
    spec = LoaderSpec(data=str(folder), engine="folder", crop=RandomCrop(8), seed=2**63 - 1)
    for data in (spec, replace(spec, data="synthetic", engine="synthetic")):
        with open_loader(replace(data, batch_size=2, max_samples=4)) as loader:
            next(loader.epoch(0))


def test_a_value_without_error_is_returned_unchanged() -> None:
    crop = RandomResizedCrop(size=32)
    assert check("crop", crop, RandomResizedCrop | RandomCrop) is crop
