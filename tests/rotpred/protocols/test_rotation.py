"""Accuracy of rotation heads in our and other projects' checkpoints, on one and two processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines.loader import open_loader
from pipelines.spec import CenterCrop, LoaderSpec
from rotpred.distributed import Rank
from rotpred.models.heads import RotNet, make_rotnet
from rotpred.protocols import rotation
from rotpred.recipes.base import FeatureRun
from rotpred.recipes.rotation import RECIPES, Rotation
from rotpred.report.results import TRAINED, read_runs
from rotpred.training.checkpoint import CheckpointFolder
from tests.support import processes

pytestmark = pytest.mark.timeout(120)

ARCH = "resnet18_tiny"


def recipe(beton: Path, tmp_path: Path, weights: Path | str, **changes: object) -> Rotation:
    val = LoaderSpec(
        data=str(beton), engine="folder", workers=1, batch_size=8, crop=CenterCrop(32, 36),
        flip=False, shuffle=False, drop_last=False,
    )  # fmt: skip
    base = Rotation(
        weights=str(weights), backbone=ARCH, val=val, run=FeatureRun(str(tmp_path / "run"), "cpu")
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def row(out: Path) -> dict[str, object]:
    (only,) = json.loads((out / "results.json").read_text())
    assert isinstance(only, dict)
    return only


@pytest.fixture(scope="module")
def turned(beton: Path) -> list[torch.Tensor]:
    """Every image in its four rotations by torch.rot90, counter-clockwise: (4, 3, S, S)."""
    spec = replace(recipe(beton, beton.parent, "random").val, views="plain", batch_size=1)
    with open_loader(spec) as loader:
        return [
            torch.cat([torch.rot90(batch.images, k, (2, 3)) for k in range(4)])
            for batch in loader.epoch(0)
        ]


@pytest.fixture(scope="module")
def net(turned: list[torch.Tensor]) -> RotNet:
    """A random network whose head predicts all four classes."""
    torch.manual_seed(11)
    made = make_rotnet(ARCH).eval()
    assert isinstance(made.head.fc, nn.Linear)
    nn.init.normal_(made.head.fc.weight, std=3)
    with torch.no_grad():
        logits = torch.cat([made(views) for views in turned])
        made.head.fc.bias -= logits.mean(0)
    return made


@pytest.fixture(scope="module")
def expected(net: RotNet, turned: list[torch.Tensor]) -> float:
    with torch.no_grad():
        answers = torch.stack([net(views).argmax(1) for views in turned])
    assert len(answers.unique()) == 4 and len(answers) == 37
    hits = sum(int(row[turn] == turn) for row in answers for turn in range(4))
    return 100 * hits / (4 * 37)


def written(net: RotNet, path: Path, layout: str) -> Path:
    """The same network as another project would save it."""
    backbone, head = net.backbone.state_dict(), net.head.state_dict()
    if layout == "ours":
        return CheckpointFolder(path).save(3, {"model": net.state_dict(), "arch": ARCH})
    if layout == "VISSL":
        model = {
            "trunk": {f"_feature_blocks.{k}": v for k, v in backbone.items()},
            "heads": {f"0.clf.0.{k.removeprefix('fc.')}": v for k, v in head.items()},
        }
        content: dict[str, object] = {"classy_state_dict": {"base_model": {"model": model}}}
    else:
        if layout != "mmselfsup 0.x":  # label 1 is a quarter turn clockwise
            head = {k: v[[0, 3, 2, 1]] for k, v in head.items()}
        state = {f"backbone.{k}": v for k, v in backbone.items()}
        state |= {f"head.fc_cls.{k.removeprefix('fc.')}": v for k, v in head.items()}
        meta = {
            "mmselfsup 0.x": {"openselfsup_version": "0.5.0"},
            "mmselfsup 1.x": {"mmengine_version": "0.1.0"},
        }.get(layout, {})
        content = {"state_dict": state, "meta": meta}
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("layout", "labels"),
    [
        ("ours", "file"),
        ("VISSL", "file"),
        ("mmselfsup 0.x", "file"),
        ("mmselfsup 1.x", "file"),
        ("mmselfsup 1.x without meta", "clockwise"),
    ],
)
def test_every_layout_has_the_same_accuracy(
    net: RotNet, expected: float, beton: Path, tmp_path: Path, layout: str, labels: str
) -> None:
    weights = written(net, tmp_path / "weights.pth", layout)
    out = rotation.run(recipe(beton, tmp_path, weights, labels=labels), Rank())
    found = row(out)
    assert found["value"] == pytest.approx(expected) and found["n"] == 4 * 37
    assert found["checkpoint_sha256"] and found["weights"] == weights.name
    (run,) = read_runs(out)
    assert run.results[0].kind == TRAINED and [p.name for p in run.figures] == ["confusion.png"]


def test_the_wrong_direction_is_another_accuracy_or_refused(
    net: RotNet, expected: float, beton: Path, tmp_path: Path
) -> None:
    weights = written(net, tmp_path / "weights.pth", "mmselfsup 1.x without meta")
    with pytest.raises(
        ValueError, match="direction of its rotation labels is unknown; pass --labels"
    ):
        rotation.run(recipe(beton, tmp_path, weights), Rank())
    wrong = recipe(beton, tmp_path, weights, labels="counter-clockwise")
    assert row(rotation.run(wrong, Rank()))["value"] != pytest.approx(expected)


def test_from_the_command_line_on_two_processes(
    net: RotNet, expected: float, beton: Path, tmp_path: Path
) -> None:
    weights = written(net, tmp_path / "weights.pth", "mmselfsup 1.x")
    args = [
        "cifar10_rotation", "--weights", str(weights), "--backbone", ARCH, "--run.device", "cpu",
        "--run.out", str(tmp_path / "run"), "--val.data", str(beton), "--val.engine", "folder",
        "--val.workers", "1", "--val.batch-size", "8", "--val.crop.resize", "36",
        "--val.normalize.mean", *map(str, LoaderSpec().normalize.mean),
        "--val.normalize.std", *map(str, LoaderSpec().normalize.std),
    ]  # fmt: skip
    console = tmp_path / "console.txt"
    status = processes.run(processes.evaluate, args, console=console, world=2)
    assert status == [0, 0], console.read_text()
    found = row(tmp_path / "run")
    assert found["benchmark"] == "cifar10_rotation"
    assert found["value"] == pytest.approx(expected) and found["n"] == 4 * 37


def test_the_control_and_what_is_refused(beton: Path, tmp_path: Path) -> None:
    found = row(rotation.run(recipe(beton, tmp_path, "random"), Rank()))
    assert found["checkpoint_sha256"] is None and found["chance"] == 25.0
    plain = recipe(beton, tmp_path, "random")
    with pytest.raises(ValueError, match="name the weights to score"):
        rotation.run(replace(plain, weights=None), Rank())
    with pytest.raises(ValueError, match="all four views"):
        rotation.run(replace(plain, val=replace(plain.val, views="plain")), Rank())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_see_every_image_once_in_four_views(name: str) -> None:
    made = RECIPES[name]()
    assert made.name == name and f"scripts/evaluate.py {name} --weights" in str(
        RECIPES[name].__doc__
    )
    assert made.val.views == "rotate4" and made.run.precision == "fp32"
    assert not (made.val.flip or made.val.shuffle or made.val.drop_last)
