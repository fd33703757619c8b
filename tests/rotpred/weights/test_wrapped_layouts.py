"""Wrapped key layouts: DistributedDataParallel, several encoders, safetensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from rotpred.models.backbone import build_backbone
from rotpred.models.heads import make_rotnet
from rotpred.training.checkpoint import CheckpointError
from rotpred.weights.load import load_backbone, load_rotnet, save_backbone
from tests.support.networks import State, equal, stir, with_prefix

pytestmark = pytest.mark.timeout(120)

NET = "resnet18_tiny"
"""Small, with the keys of a ResNet-18."""
BACKBONE = stir(build_backbone(NET)).state_dict()
DIM = build_backbone(NET).dim
FC = {"weight": torch.zeros(4, DIM), "bias": torch.arange(4.0)}
ONE = torch.zeros(1)
CLASSIFIER = {"fc.weight": torch.zeros(1000, DIM), "fc.bias": torch.zeros(1000)}
MLP = ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.num_batches_tracked", "3.weight")
"""Keys of a projection or prediction head: Linear, batch norm, ReLU, Linear."""


def mlp(prefix: str) -> State:
    return with_prefix(dict.fromkeys(MLP, ONE), prefix)


def bare_files() -> dict[str, State]:
    """State dicts with the key names of the bare models, without wrappers."""
    queue = {"queue": ONE, "queue_ptr": ONE.long()}
    moco = with_prefix(BACKBONE, "encoder_q.") | with_prefix(BACKBONE, "encoder_k.") | queue
    moco |= {f"{part}.fc.{key}": ONE for part in ("encoder_q", "encoder_k") for key in MLP}
    third = with_prefix(BACKBONE, "base_encoder.") | with_prefix(BACKBONE, "momentum_encoder.")
    third |= mlp("base_encoder.fc.") | mlp("momentum_encoder.fc.") | mlp("predictor.")
    siam = with_prefix(BACKBONE, "encoder.") | mlp("encoder.fc.") | mlp("predictor.")
    blocks = with_prefix(BACKBONE, "_feature_blocks.")
    return {
        "flat keys (torchvision, timm)": BACKBONE | CLASSIFIER,
        "MoCo": moco,
        "MoCo v3": third,
        "SimSiam": siam,
        "backbone and head (mmselfsup)": with_prefix(BACKBONE, "backbone.")
        | with_prefix(FC, "head.fc_cls."),
        "VISSL": with_prefix(blocks, "trunk.") | with_prefix(FC, "heads.0.clf.0."),
    }


LAYOUTS = sorted(bare_files())


def write(path: Path, state: State) -> Path:
    """A checkpoint as those programs save it, or safetensors."""
    if path.suffix == ".safetensors":
        # safetensors refuses tensors that share memory.
        safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, path)
    else:
        torch.save({"epoch": 1, "arch": "resnet18", "state_dict": state}, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize("name", ["x.pth.tar", "x.safetensors"])
def test_backbones_arrive_whole(tmp_path: Path, layout: str, wrapper: str, name: str) -> None:
    """No tensor of the backbone is missing; all others are ignored and reported by their names."""
    state = with_prefix(bare_files()[layout], wrapper)
    net = build_backbone(NET)
    report = load_backbone(net, write(tmp_path / name, state))
    assert equal(net.state_dict(), BACKBONE) and report.layout == layout
    assert report.missing == () and set(report.ignored) < set(state)
    assert len(report.ignored) == len(state) - len(BACKBONE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize("name", ["x.pth.tar", "x.safetensors"])
def test_unknown_keys_are_refused(tmp_path: Path, layout: str, wrapper: str, name: str) -> None:
    """Also a key that lacks the wrapper of the others, or is the only one with it."""
    net = build_backbone(NET)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for key in ("neck.0.weight", "module.neck.0.weight"):
        state = with_prefix(bare_files()[layout], wrapper) | {key: ONE}
        with pytest.raises(CheckpointError, match=r"tiny: 1 unknown \((module\.)?neck\.0\.weight"):
            load_backbone(net, write(tmp_path / name, state))
        assert equal(net.state_dict(), before)


@pytest.mark.parametrize("layout", ["MoCo v3", "SimSiam"])
def test_an_encoder_with_another_backbone_is_refused(tmp_path: Path, layout: str) -> None:
    """A transformer, whose keys no residual network has."""
    state = {key: value for key, value in bare_files()[layout].items() if ".layer" not in key}
    stem = "encoder" if layout == "SimSiam" else "base_encoder"
    state[f"{stem}.blocks.0.attn.qkv.weight"] = ONE
    with pytest.raises(CheckpointError, match=r"missing .*; 1 unknown \(blocks\.0\.attn"):
        load_backbone(build_backbone(NET), write(tmp_path / "x.pth", state))


def test_a_rotation_head_comes_out_of_its_wrapping(tmp_path: Path) -> None:
    """mmselfsup's head, wrapped. safetensors lack the direction of rotation: it must be given."""
    state = with_prefix(bare_files()["backbone and head (mmselfsup)"], "module.")
    torch.save({"meta": {"mmengine_version": "0.1.0"}, "state_dict": state}, tmp_path / "x.pth")
    net = make_rotnet(NET)
    assert load_rotnet(net, tmp_path / "x.pth").ignored == ()
    assert net.head.fc.bias.tolist() == [0.0, 3.0, 2.0, 1.0]
    path = write(tmp_path / "x.safetensors", state)
    with pytest.raises(CheckpointError, match="direction of its rotation labels is unknown"):
        load_rotnet(net, path)
    load_rotnet(net, path, clockwise=False)
    assert net.head.fc.bias.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_projections_are_no_rotation_heads(tmp_path: Path) -> None:
    for layout in ("MoCo", "MoCo v3", "SimSiam"):
        path = write(tmp_path / "x.pth", with_prefix(bare_files()[layout], "module."))
        with pytest.raises(CheckpointError, match=f"{layout}.* holds no rotation head"):
            load_rotnet(make_rotnet(NET), path)


def test_our_own_safetensors_are_ours(tmp_path: Path) -> None:
    """By the network name in their header, not by their keys."""
    net = build_backbone(NET)
    net.load_state_dict(BACKBONE)
    save_backbone(tmp_path / "x.safetensors", net, {})
    assert load_backbone(build_backbone(NET), tmp_path / "x.safetensors").layout == "rotpred"
