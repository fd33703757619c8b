"""Weight files of the RotNet authors: our networks compute the same as theirs."""

from __future__ import annotations

import pickle
import types
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from rotpred.models.backbone import build_backbone
from rotpred.models.heads import make_rotnet
from rotpred.training.checkpoint import CheckpointError
from rotpred.weights.load import load_backbone, load_rotnet
from tests.support.networks import equal, stir

pytestmark = pytest.mark.timeout(120)


class Unit(nn.Module):
    """The authors' BasicBlock."""

    def __init__(self, inputs: int, width: int, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        conv = nn.Conv2d(inputs, width, size, padding=size // 2, bias=False)
        self.layers.add_module("Conv", conv)
        self.layers.add_module("BatchNorm", nn.BatchNorm2d(width))
        self.layers.add_module("ReLU", nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Blocks(nn.Module):
    """A network of the authors: all modules are in `_feature_blocks`."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self._feature_blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for block in self._feature_blocks:
            x = block(x)
            outputs.append(x)
        return outputs


def authors_nin(stages: int) -> Blocks:
    blocks: list[nn.Module] = []
    for k in range(1, stages + 1):
        inputs, widths = (3, (192, 160, 96)) if k == 1 else (96 if k == 2 else 192, (192,) * 3)
        block = nn.Sequential()
        for j, width in enumerate(widths, start=1):
            size = 1 if j > 1 else (5 if k < 3 else 3)
            block.add_module(f"Block{k}_ConvB{j}", Unit(inputs, width, size))
            inputs = width
        if k == 1:
            block.add_module("Block1_MaxPool", nn.MaxPool2d(3, 2, 1))
        if k == 2:
            block.add_module("Block2_AvgPool", nn.AvgPool2d(3, 2, 1))
        blocks.append(block)
    last = nn.Sequential()
    last.add_module("GlobalAveragePooling", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    last.add_module("Classifier", nn.Linear(192, 4))
    return Blocks([*blocks, last])


def authors_alexnet() -> Blocks:
    def unit(inputs: int, width: int, size: int, stride: int, padding: int) -> nn.Module:
        conv = nn.Conv2d(inputs, width, size, stride, padding)
        return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())

    full = [nn.Flatten()]
    for inputs in (9216, 4096):
        full += [nn.Linear(inputs, 4096, bias=False), nn.BatchNorm1d(4096), nn.ReLU()]
    return Blocks(
        [
            unit(3, 64, 11, 4, 2), nn.MaxPool2d(3, 2), unit(64, 192, 5, 1, 2), nn.MaxPool2d(3, 2),
            unit(192, 384, 3, 1, 1), unit(384, 256, 3, 1, 1), unit(256, 256, 3, 1, 1),
            nn.MaxPool2d(3, 2), nn.Sequential(*full), nn.Sequential(nn.Linear(4096, 4)),
        ]
    )  # fmt: skip


@pytest.mark.parametrize("stages", [3, 4, 5])
def test_the_authors_nin_computes_the_same_here(tmp_path: Path, stages: int) -> None:
    theirs = stir(authors_nin(stages))
    path = tmp_path / "model_net_epoch200"
    torch.save({"epoch": 200, "network": theirs.state_dict()}, path)
    ours = make_rotnet(f"nin{stages}").eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    report = load_backbone(ours.backbone, path)
    assert report.layout == "RotNet authors' NIN" and report.missing == ()
    assert report.ignored == tuple(
        f"_feature_blocks.{stages}.Classifier.{k}" for k in ("weight", "bias")
    )
    with torch.no_grad():
        *maps, logits = theirs(images)
        for mine, other in zip(ours.backbone.stages(images), maps, strict=True):
            assert other.std() > 0 and torch.equal(mine, other)
        assert not torch.allclose(ours(images), logits)
        load_rotnet(ours, path)
        torch.testing.assert_close(ours(images), logits)
    with pytest.raises(CheckpointError, match="does not fit nin"):
        load_backbone(build_backbone("nin4" if stages != 4 else "nin5"), path)


def test_the_authors_alexnet_computes_the_same_here(tmp_path: Path) -> None:
    theirs = stir(authors_alexnet())
    path = tmp_path / "model_net_epoch50"
    torch.save({"epoch": 50, "network": theirs.state_dict()}, path)
    ours = make_rotnet("alexnet").eval()
    report = load_rotnet(ours, path)
    assert len(report.loaded) == len(theirs.state_dict()) and report.ignored == ()
    images = torch.randn(1, 3, 227, 227, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = theirs(images)
        for mine, k in zip(ours.backbone.stages(images), (0, 2, 4, 5, 6), strict=True):
            assert torch.equal(mine, outputs[k])
        torch.testing.assert_close(ours(images), outputs[-1])
    vissl = tmp_path / "rotnet_alexnet.torch"
    torch.save({"model_state_dict": theirs.state_dict()}, vissl)
    alexnet = build_backbone("alexnet")
    assert len(load_backbone(alexnet, vissl).ignored) == 14
    assert equal(alexnet.state_dict(), ours.backbone.state_dict())


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes str as Python 2 wrote its byte strings."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_str(self, text: str) -> None:
        data = text.encode()
        self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        self.memoize(text)

    dispatch[str] = save_str


def test_files_from_python_2_are_read(tmp_path: Path) -> None:
    """Like the authors' files: a sequence of pickles instead of an archive, no batch counters."""
    theirs = stir(authors_nin(3)).state_dict()
    state = OrderedDict((k, v) for k, v in theirs.items() if "num_batches" not in k)
    module = types.SimpleNamespace(
        Pickler=Python2Pickler, dumps=pickle.dumps, dump=pickle.dump, __name__="pickle"
    )
    module.dump = lambda value, file, protocol: Python2Pickler(file, protocol).dump(value)
    path = tmp_path / "model_net_epoch1"
    torch.save(
        {"epoch": 1, "network": state}, path, module, 2, _use_new_zipfile_serialization=False
    )
    assert b"U" + bytes([7]) + b"network" in path.read_bytes()
    net = build_backbone("nin3")
    report = load_backbone(net, path)
    assert len(report.missing) == 9 and len(report.loaded) == 45
    assert torch.equal(net.block2.bn3.running_var, theirs[
        "_feature_blocks.1.Block2_ConvB3.layers.BatchNorm.running_var"
    ])  # fmt: skip
