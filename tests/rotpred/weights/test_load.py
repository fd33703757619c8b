"""Backbone weights: round trips, files of other projects, mismatched and broken files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import torchvision

from pipelines.storage import sha256_file
from rotpred.models.backbone import build_backbone
from rotpred.models.heads import RotNet, make_rotnet
from rotpred.training.checkpoint import CheckpointError, CheckpointFolder
from rotpred.weights.load import load_backbone, save_backbone

pytestmark = pytest.mark.timeout(120)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[key]) for key, value in a.state_dict().items())


def test_safetensors_round_trip(tmp_path: Path) -> None:
    first = build_backbone("resnet18").to(memory_format=torch.channels_last)
    path = tmp_path / "run" / "backbone.safetensors"
    digest = save_backbone(path, first, {"recipe": "smoke"})
    assert digest == sha256_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"recipe": "smoke", "arch": "resnet18"}
    second = build_backbone("resnet18")
    report = load_backbone(second, path)
    assert same(first, second)
    assert set(report.loaded) == set(first.state_dict())
    assert (report.ignored, report.missing, report.sha256) == ((), (), digest)
    assert report.summary() == "rotpred: 120 tensors loaded, 0 ignored, 0 missing"
    torchvision.models.resnet18().load_state_dict(
        {
            **safetensors.torch.load_file(path),
            "fc.weight": torch.zeros(1000, 512),
            "fc.bias": torch.zeros(1000),
        },
        strict=True,
    )


def test_equal_weights_give_equal_files(tmp_path: Path) -> None:
    backbone = build_backbone("nin3")
    meta = dict.fromkeys("zaqxsw", "é")
    found = {save_backbone(tmp_path / f"{k}.safetensors", backbone, meta) for k in range(8)}
    assert len(found) == 1
    load_backbone(build_backbone("nin3"), tmp_path / "0.safetensors")
    with safetensors.safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert file.metadata() == {**meta, "arch": "nin3"}


def test_our_training_checkpoint_gives_its_backbone(tmp_path: Path) -> None:
    net = make_rotnet("nin4")
    path = CheckpointFolder(tmp_path).save(
        5, {"model": net.state_dict(), "arch": "nin4", "epoch": 1}
    )
    backbone = build_backbone("nin4")
    report = load_backbone(backbone, path)
    assert same(net.backbone, backbone)
    assert report.ignored == ("head.fc.weight", "head.fc.bias")
    with pytest.raises(CheckpointError, match="weights of nin4, not of nin5"):
        load_backbone(build_backbone("nin5"), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="changed since"):
        load_backbone(backbone, path)


def test_the_alexnet_head_is_ignored_whole(tmp_path: Path) -> None:
    backbone = build_backbone("alexnet")
    head = torch.nn.ModuleDict({"fc6": torch.nn.Linear(2, 2), "bn6": torch.nn.BatchNorm1d(2)})
    torch.save(RotNet(backbone, head).state_dict(), tmp_path / "a.pt")
    report = load_backbone(build_backbone("alexnet"), tmp_path / "a.pt")
    assert len(report.ignored) == 7


def test_torchvision_and_mmselfsup_files(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "flat.pth")
    backbone = build_backbone("resnet18")
    report = load_backbone(backbone, tmp_path / "flat.pth")
    assert set(report.ignored) == {"fc.weight", "fc.bias"}
    assert same(backbone, theirs)
    content = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    content |= {"head.fc_cls.weight": torch.zeros(4, 512), "head.fc_cls.bias": torch.zeros(4)}
    torch.save({"state_dict": content, "meta": {"epoch": 70}}, tmp_path / "mm.pth")
    other = build_backbone("resnet18")
    assert load_backbone(other, tmp_path / "mm.pth").ignored == (
        "head.fc_cls.weight", "head.fc_cls.bias"
    )  # fmt: skip
    assert same(backbone, other)


def test_old_files_without_batch_counters(tmp_path: Path) -> None:
    first, second = build_backbone("nin3"), build_backbone("nin3")
    content = {k: v for k, v in first.state_dict().items() if "num_batches" not in k}
    torch.save(content, tmp_path / "old.pt")
    report = load_backbone(second, tmp_path / "old.pt")
    assert len(report.missing) == 9 and all("num_batches_tracked" in k for k in report.missing)
    assert torch.equal(first.block1.conv1.weight, second.block1.conv1.weight)


def spoil(content: dict[str, torch.Tensor], how: str) -> dict[str, object]:
    key = "layer1.0.conv1.weight"
    spoilt: dict[str, object] = dict(content)
    if how == "prefix":
        return {f"net.{k}": v for k, v in content.items()}
    if how == "missing":
        del spoilt[key]
    elif how == "unknown":
        spoilt["neck.fc0.weight"] = torch.zeros(1)
    elif how == "shape":
        spoilt[key] = content[key][:, :-1]
    elif how == "type":
        spoilt[key] = content[key].int()
    elif how == "nan":
        spoilt[key] = content[key].clone()
        spoilt[key][0, 0, 0, 0] = float("nan")  # type: ignore[index]
    elif how == "infinite statistics":
        spoilt["bn1.running_var"] = torch.full((64,), float("inf"))
    elif how == "no tensor":
        spoilt[key] = 1.0
    elif how == "half prefixed":
        spoilt[f"backbone.{key}"] = spoilt.pop(key)
    return spoilt


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("prefix", r"100 missing \(conv1.weight.*120 unknown \(net.conv1.weight"),
        ("missing", r"1 missing \(layer1.0.conv1.weight\)"),
        ("unknown", r"1 unknown \(neck.fc0.weight\)"),
        ("shape", r"layer1.0.conv1.weight \(64, 63, 3, 3\), expected \(64, 64, 3, 3\)"),
        ("type", "of another shape or type"),
        ("nan", r"1 not finite \(layer1.0.conv1.weight\)"),
        ("infinite statistics", r"1 not finite \(bn1.running_var\)"),
        ("no tensor", "are not tensors"),
        ("half prefixed", "missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, how: str, words: str) -> None:
    backbone = build_backbone("resnet18")
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save(spoil(build_backbone("resnet18").state_dict(), how), path)
    with pytest.raises(CheckpointError, match=words):
        load_backbone(backbone, path)
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    save_backbone(path, build_backbone("resnet18_small"), {})
    with pytest.raises(CheckpointError, match="weights of resnet18_small, not of resnet18"):
        load_backbone(build_backbone("resnet18"), path)
    torch.save(build_backbone("nin3").state_dict(), tmp_path / "nin.pth")
    with pytest.raises(CheckpointError, match=r"does not fit resnet18: .*missing.*unknown"):
        load_backbone(build_backbone("resnet18"), tmp_path / "nin.pth")


def test_broken_and_absent_files_are_refused(tmp_path: Path) -> None:
    backbone = build_backbone("nin3")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_backbone(backbone, tmp_path / "absent.pth")
    path = tmp_path / "cut.safetensors"
    save_backbone(path, backbone, {})
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_backbone(backbone, path)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(CheckpointError, match="damaged"):
        load_backbone(backbone, tmp_path / "text.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_backbone(backbone, tmp_path / "list.pth")


def test_sick_weights_are_not_exported(tmp_path: Path) -> None:
    backbone = build_backbone("nin3")
    torch.nn.init.constant_(backbone.block1.bn1.weight, float("nan"))
    with pytest.raises(CheckpointError, match=r"not finite: block1.bn1.weight"):
        save_backbone(tmp_path / "x.safetensors", backbone, {})
    assert list(tmp_path.iterdir()) == []
