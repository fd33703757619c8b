"""Published data set layouts: converted by scripts/to_beton.py, read directly, files missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.beton.reader import Beton
from pipelines.samples import open_samples
from tests.support.classification_trees import Tree, Trees, make_trees
from tests.support.scripts import load_script

pytestmark = pytest.mark.timeout(120)

TO_BETON = load_script("to_beton")
LAYOUTS = ["in1k_linear", "in1k_mhead", "inat18_mhead", "places205_mhead", "in1k_semi_1"]


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Trees:
    return make_trees(tmp_path_factory.mktemp("trees"))


def convert(data: str, root: str, output: Path) -> Any:
    made = TO_BETON.Arguments(
        input=data, root=Path(root) if root else None, output=output, workers=1,
        restart_markers=False,
    )  # fmt: skip
    return TO_BETON.main(made)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_to_a_beton_and_directly(name: str, trees: Trees, tmp_path: Path) -> None:
    """The beton has the same images, labels and classes as the files read directly."""
    tree = trees[name]
    for part, data, root in (
        ("train", tree.train, tree.train_root),
        ("val", tree.val, tree.val_root),
    ):
        files = open_samples(data, root)
        line = convert(data, root, tmp_path / f"{part}.beton")
        assert f"{len(files)} samples" in line and "; 0 left out" in line
        with Beton.open(tmp_path / f"{part}.beton") as beton:
            assert beton.labels.tolist() == files.labels.tolist()
            assert beton.classes == files.classes
            for i in range(len(files)):
                assert bytes(beton.read(i)) == files.read(i)
    assert beton.labels.tolist() == tree.truth


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("in1k_mhead", r"meta/train\.txt:5: '.*' does not exist"),
        ("places205_mhead", r"train_places205\.csv:5: '.*' does not exist"),
        ("inat18_mhead", r"train2018\.json: image id 94: '.*' does not exist"),
        ("in1k_semi_1", r"percent\.txt:5: no image '.*' below"),
    ],
)
def test_a_missing_image_is_not_counted_as_undecodable(
    name: str, words: str, tmp_path: Path
) -> None:
    """The error names the place that lists the image; no limit on undecodable samples covers it."""
    tree: Tree = make_trees(tmp_path)[name]
    files = open_samples(tree.train, tree.train_root)
    files.path(4).unlink()  # type: ignore[union-attr]
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        open_samples(tree.train, tree.train_root)
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        convert(tree.train, tree.train_root, tmp_path / "out.beton")
    assert not (tmp_path / "out.beton").exists()
    assert np.all(files.labels >= 0)
