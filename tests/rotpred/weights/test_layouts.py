"""Weight files of other projects: their key layouts around our backbones, read back."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision

from rotpred.models.backbone import build_backbone
from rotpred.models.heads import make_rotnet
from rotpred.training.checkpoint import CheckpointError, CheckpointFolder
from rotpred.weights.load import load_backbone, load_rotnet, read_backbone
from tests.support.networks import equal, stir, with_prefix

pytestmark = pytest.mark.timeout(120)


BACKBONE = stir(build_backbone("resnet18")).state_dict()
FC = {"weight": torch.arange(4.0)[:, None].expand(4, 512).clone(), "bias": torch.arange(4.0)}


def foreign_files() -> dict[str, Any]:
    """One file of each layout around the same backbone."""
    mm = with_prefix(BACKBONE, "backbone.") | with_prefix(FC, "head.fc_cls.")
    blocks = with_prefix(BACKBONE, "_feature_blocks.")
    model = {"trunk": blocks, "heads": with_prefix(FC, "0.clf.0.")}
    classy = {"base_model": {"model": model}, "optimizer": {"lr": 0.1}, "meters": [{}]}
    moco = with_prefix(BACKBONE, "module.encoder_q.") | with_prefix(BACKBONE, "module.encoder_k.")
    moco |= with_prefix(
        {"0.weight": torch.zeros(1), "2.bias": torch.zeros(1)}, "module.encoder_q.fc."
    )
    moco |= {"module.queue": torch.zeros(1), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    full = BACKBONE | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    return {
        "torchvision": full,
        "timm": {"arch": "resnet18", "state_dict": full, "args": argparse.Namespace(lr=0.1)},
        "mmselfsup 0.x": {"meta": {"mmselfsup_version": "0.8.0", "epoch": 70}, "state_dict": mm},
        "mmselfsup 1.x": {"meta": {"mmengine_version": "0.1.0"}, "state_dict": mm},
        "mmselfsup without meta": {"state_dict": mm},
        "mmselfsup extracted": {"state_dict": dict(BACKBONE), "author": "MMSelfSup"},
        "VISSL": {"phase": 125, "loss": np.float64(0.5), "classy_state_dict": classy},
        "VISSL flat": blocks,
        "VISSL converted": dict(BACKBONE),
        "VISSL live": with_prefix(blocks, "trunk.base_model.") | {"heads.0.a": FC["bias"]},
        "MoCo": {"epoch": 200, "arch": "resnet18", "state_dict": moco, "optimizer": {"state": {}}},
    }  # fmt: skip


@pytest.mark.parametrize("layout", foreign_files())
def test_foreign_backbones_arrive_whole(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "weights.pth"
    content = foreign_files()[layout]
    torch.save(content, path)
    net = build_backbone("resnet18")
    report = load_backbone(net, path)
    assert equal(net.state_dict(), BACKBONE) and set(report.loaded) == set(BACKBONE)
    assert report.missing == ()
    expected = {
        "torchvision": 2, "timm": 2, "VISSL": 2, "VISSL live": 1, "MoCo": len(BACKBONE) + 4,
        "mmselfsup 0.x": 2, "mmselfsup 1.x": 2, "mmselfsup without meta": 2,
    }.get(layout, 0)  # fmt: skip
    assert len(report.ignored) == expected
    words = report.summary()
    assert report.layout in words and f"{len(BACKBONE)} tensors loaded, {expected} ignored" in words
    with pytest.raises(CheckpointError, match="name its arch"):
        read_backbone(path)
    built, again = read_backbone(path, "resnet18")
    assert equal(built.state_dict(), BACKBONE) and again == report


@pytest.mark.parametrize(
    "layout", ["torchvision", "timm", "mmselfsup 1.x", "VISSL", "VISSL live", "MoCo"]
)
@pytest.mark.parametrize("how", ["missing", "unknown", "shape"])
def test_damaged_foreign_files_are_refused(tmp_path: Path, layout: str, how: str) -> None:
    content = foreign_files()[layout]
    inner = content
    for key in ("classy_state_dict", "base_model", "model", "trunk", "state_dict"):
        inner = inner.get(key, inner)
    # mmselfsup's own conversion can lose the first convolution silently.
    key = next(key for key in inner if key.endswith("conv1.weight"))
    if how == "missing":
        del inner[key]
        words = r"1 missing \(conv1.weight\)"
    elif how == "unknown":
        inner["neck.fc.weight"] = torch.zeros(1)
        words = r"1 unknown \((trunk\.)?neck.fc.weight\)"
    else:
        inner[key] = inner[key][:, :, :3]
        words = r"conv1.weight \(64, 3, 3, 7\), expected \(64, 3, 7, 7\)"
    torch.save(content, tmp_path / "weights.pth")
    net = build_backbone("resnet18")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        load_backbone(net, tmp_path / "weights.pth")
    assert equal(net.state_dict(), before)


@pytest.mark.parametrize(
    ("layout", "given", "order"),
    [
        ("mmselfsup 0.x", None, [0, 1, 2, 3]),
        ("mmselfsup 1.x", None, [0, 3, 2, 1]),
        ("mmselfsup 1.x", True, [0, 3, 2, 1]),
        ("mmselfsup without meta", True, [0, 3, 2, 1]),
        ("mmselfsup without meta", False, [0, 1, 2, 3]),
        ("VISSL", None, [0, 1, 2, 3]),
    ],
)
def test_rotation_heads_count_counter_clockwise(
    tmp_path: Path, layout: str, given: bool | None, order: list[int]
) -> None:
    torch.save(foreign_files()[layout], tmp_path / "weights.pth")
    net = make_rotnet("resnet18").eval()
    report = load_rotnet(net, tmp_path / "weights.pth", clockwise=given)
    assert report.ignored == () and len(report.loaded) == len(BACKBONE) + 2
    assert equal(net.backbone.state_dict(), BACKBONE)
    assert net.head.fc.bias.tolist() == [float(k) for k in order]
    assert net.head.fc.weight[:, 5].tolist() == [float(k) for k in order]


def test_our_own_head_comes_back(tmp_path: Path) -> None:
    first, second = stir(make_rotnet("nin3")), make_rotnet("nin3")
    path = CheckpointFolder(tmp_path).save(1, {"model": first.state_dict(), "arch": "nin3"})
    assert load_rotnet(second, path).layout == "rotpred checkpoint"
    assert equal(first.state_dict(), second.state_dict())


@pytest.mark.parametrize(
    ("layout", "given", "words"),
    [
        ("mmselfsup without meta", None, "direction of its rotation labels is unknown"),
        ("mmselfsup 1.x", False, "its rotation labels are clockwise, which contradicts"),
        ("mmselfsup 0.x", True, "its rotation labels are counter-clockwise, which contradicts"),
        ("torchvision", None, "holds no rotation head"),
        ("MoCo", None, "holds no rotation head"),
        ("mmselfsup extracted", None, "holds no rotation head"),
    ],
)
def test_heads_of_unclear_meaning_are_refused(
    tmp_path: Path, layout: str, given: bool | None, words: str
) -> None:
    torch.save(foreign_files()[layout], tmp_path / "weights.pth")
    net = make_rotnet("resnet18")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        load_rotnet(net, tmp_path / "weights.pth", clockwise=given)
    assert equal(net.state_dict(), before)


def test_a_head_of_other_classes_is_refused(tmp_path: Path) -> None:
    content = foreign_files()["mmselfsup 0.x"]
    content["state_dict"]["head.fc_cls.weight"] = torch.zeros(1000, 512)
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"head.fc.weight \(1000, 512\), expected \(4, 512\)"):
        load_rotnet(make_rotnet("resnet18"), tmp_path / "weights.pth")
    content["meta"] = {"mmengine_version": "1"}
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="expected 4 rotations"):
        load_rotnet(make_rotnet("resnet18"), tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_live_models_of_timm_and_torchvision(tmp_path: Path, name: str) -> None:
    for theirs in (timm.create_model(name, pretrained=False), torchvision.models.get_model(name)):
        torch.save(stir(theirs).state_dict(), tmp_path / "flat.pth")
        ours = build_backbone(name).eval()
        assert load_backbone(ours, tmp_path / "flat.pth").ignored == ("fc.weight", "fc.bias")
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(
                theirs.fc(ours.pooled(images)), theirs(images), rtol=1e-4, atol=1e-4
            )


class HistoryBuffer:
    """Like mmengine's class in a file: later versions save their methods, by getattr."""

    def __init__(self) -> None:
        self._log_history = np.arange(3.0)
        self._max_length = 10

    def mean(self) -> float:
        return float(self._log_history.mean())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}


def test_bookkeeping_of_other_programs_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "mmengine.logging.history_buffer"
    for part in ("mmengine", "mmengine.logging", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    monkeypatch.setattr(HistoryBuffer, "__module__", name)
    content = foreign_files()["mmselfsup without meta"]
    content["message_hub"] = {"log_scalars": OrderedDict(a=HistoryBuffer()), "x": np.int64(3)}
    torch.save(content, tmp_path / "epoch_70.pth")
    net = make_rotnet("resnet18")
    load_rotnet(net, tmp_path / "epoch_70.pth")
    assert net.head.fc.bias.tolist() == [0.0, 3.0, 2.0, 1.0]
    content["state_dict"]["backbone.bn1.bias"] = np.zeros(64)
    torch.save(content, tmp_path / "epoch_70.pth")
    with pytest.raises(CheckpointError, match=r"bn1\.bias are not tensors"):
        load_backbone(build_backbone("resnet18"), tmp_path / "epoch_70.pth")


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    content = {**foreign_files()["mmselfsup 0.x"], "hook": Runs(tmp_path / "marker")}
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"a posix\.mkdir, which may run code"):
        load_backbone(build_backbone("resnet18"), tmp_path / "bad.pth")
    assert not (tmp_path / "marker").exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "marker").exists()  # without restrictions it would have run


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {}, "state_dict": {}}, "several state dicts: model, state_dict"),
        ({"classy_state_dict": {"base_model": {}}}, "expected trunk and heads"),
        ({"_feature_blocks.3.Classifier.bias": FC["bias"], "_feature_blocks.4.Classifier.bias":
          FC["bias"], "_feature_blocks.0.Block1_ConvB1.layers.Conv.weight": FC["bias"]}, "second"),
        ({"state_dict": {}}, "missing"),
    ],
)  # fmt: skip
def test_files_of_no_layout_are_refused(
    tmp_path: Path, content: dict[str, Any], words: str
) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=words):
        load_backbone(build_backbone("resnet18"), tmp_path / "weights.pth")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"model": Runs(tmp_path / "marker")}))
    with pytest.raises(CheckpointError, match="only written, never read"):
        load_backbone(build_backbone("resnet50"), tmp_path / "R-50.pkl")
    assert not (tmp_path / "marker").exists()
