"""Exported weights: loading in other projects, limits of each format, the command."""

from __future__ import annotations

import copy
import io
import pickle
import re
import runpy
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import safetensors
import timm
import torch
import torchvision
from onnx.reference import ReferenceEvaluator
from torch import nn

import rotpred.weights.export
from pipelines.storage import sha256_file
from rotpred.models.backbone import build_backbone
from rotpred.models.base import Backbone
from rotpred.models.heads import make_rotnet
from rotpred.training.checkpoint import CheckpointError, CheckpointFolder
from rotpred.weights.export import ExportedFile, export_backbone
from rotpred.weights.formats import SUFFIXES, Format, reader_settings
from rotpred.weights.load import load_backbone, save_backbone
from tests.support.networks import equal, stir

pytestmark = pytest.mark.timeout(240)

SCRIPT = Path(__file__).parents[3] / "scripts" / "export.py"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_and_timm_load_all_of_it(tmp_path: Path, name: str) -> None:
    net = stir(build_backbone(name))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = net.pooled(images)
    paths: dict[Format, Path] = {"torchvision": tmp_path / "tv.pth", "timm": tmp_path / "timm.pth"}
    for form, path in paths.items():
        made = export_backbone(net, path, form, {})
        assert made == (path, len(net.state_dict()), path.stat().st_size, sha256_file(path))
    bare = timm.create_model(name, pretrained=False, num_classes=0).eval()
    bare.load_state_dict(torch.load(paths["timm"], weights_only=True), strict=True)
    full = torchvision.models.get_model(name).eval()
    found = full.load_state_dict(torch.load(paths["torchvision"], weights_only=True), strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    full.fc = nn.Identity()
    with torch.no_grad():
        for theirs in (bare, full):
            torch.testing.assert_close(theirs(images), expected, rtol=1e-4, atol=1e-4)
    assert load_backbone(build_backbone(name), paths["timm"]).ignored == ()


@pytest.mark.parametrize("form", ["mmdet", "mmseg"])
def test_openmmlab_finds_the_prefix(tmp_path: Path, form: Format) -> None:
    net = stir(build_backbone("resnet18"))
    export_backbone(net, tmp_path / "mm.pth", form, {"source_sha256": "ab"})
    content = torch.load(tmp_path / "mm.pth", weights_only=True)
    assert content["meta"] == {"arch": "resnet18", "source_sha256": "ab"}
    assert all(key.startswith("backbone.") for key in content["state_dict"])
    assert equal({key[9:]: value for key, value in content["state_dict"].items()}, net.state_dict())
    again = build_backbone("resnet18")
    load_backbone(again, tmp_path / "mm.pth")
    assert equal(again.state_dict(), net.state_dict())


class ArraysOnly(pickle.Unpickler):
    """Resolves two classes that every Python and NumPy has, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = {("numpy", "ndarray"): np.ndarray, ("builtins", "bytearray"): bytearray}
        return known[module, name]


DETECTRON2 = {
    "stem.conv1.weight": "conv1.weight",
    "stem.conv1.norm.running_var": "bn1.running_var",
    "stem.conv1.norm.num_batches_tracked": "bn1.num_batches_tracked",
    "res2.0.conv1.weight": "layer1.0.conv1.weight",
    "res2.0.conv1.norm.weight": "layer1.0.bn1.weight",
    "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
    "res2.0.shortcut.norm.bias": "layer1.0.downsample.1.bias",
    "res3.3.conv2.norm.running_mean": "layer2.3.bn2.running_mean",
    "res4.5.conv3.weight": "layer3.5.conv3.weight",
    "res5.2.conv3.norm.bias": "layer4.2.bn3.bias",
}


def detectron2_names() -> set[str]:
    """All names of detectron2's ResNet-50, from its structure: stem, bottlenecks, shortcuts."""
    units = ["stem.conv1"]
    for stage, blocks in enumerate((3, 4, 6, 3), start=2):
        units.append(f"res{stage}.0.shortcut")
        units += [f"res{stage}.{b}.conv{k}" for b in range(blocks) for k in (1, 2, 3)]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{unit}.weight" for unit in units} | {f"{u}.norm.{k}" for u in units for k in norm}


def test_detectron2_gets_its_names_and_arrays(tmp_path: Path) -> None:
    net = stir(build_backbone("resnet50"))
    made = export_backbone(net, tmp_path / "r50.pkl", "detectron2", {})
    content = ArraysOnly(io.BytesIO((tmp_path / "r50.pkl").read_bytes())).load()
    assert content["matching_heuristics"] is True and content["__author__"] == "rotpred"
    model = content["model"]
    assert set(model) == detectron2_names() and made.tensors == len(model)
    own = net.state_dict()
    for theirs, ours in DETECTRON2.items():
        assert np.array_equal(model[theirs], own[ours].numpy())
        assert model[theirs].dtype == own[ours].numpy().dtype and model[theirs].flags.writeable
    # Every tensor once: only the names have changed, not the order.
    for array, (key, value) in zip(model.values(), own.items(), strict=True):
        assert torch.equal(torch.from_numpy(array), value), key


ZOO = "mean [0.485,0.456,0.406], std [0.229,0.224,0.225]"
BYTES = "mean [123.675,116.28,103.53], std [58.395,57.12,57.375]"


@pytest.mark.parametrize(
    ("forms", "words"),
    [
        (("timm", "torchvision", "onnx", "safetensors"), ("RGB in 0..1", f"recipes use {ZOO};")),
        (("mmdet", "mmseg"), ("bgr_to_rgb=True", "style='pytorch'", f"recipes use {BYTES};")),
        (
            ("detectron2",),
            (
                "INPUT.FORMAT RGB",
                "MODEL.RESNETS.STRIDE_IN_1X1 False",
                "MODEL.PIXEL_MEAN [123.675,116.28,103.53]",
                "MODEL.PIXEL_STD [58.395,57.12,57.375]",
            ),
        ),
    ],
)
def test_how_each_format_is_to_be_read(forms: tuple[Format, ...], words: tuple[str, ...]) -> None:
    """The statistics in the unit of the project; CIFAR-10 recipes have others."""
    for form in forms:
        text = reader_settings(form)
        assert all(part in text for part in words) and "\n" not in text
        ours = "[125.3,123,113.9]" if "116.28" in text else "[0.4914,0.4824,0.4467]"
        assert "CIFAR-10 recipes" in text and ours in text


def test_every_format_says_how() -> None:
    assert all("as in pretraining" in reader_settings(form) for form in SUFFIXES)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Backbone, ExportedFile]]:
    """Two networks as ONNX, exported once because each takes seconds."""
    folder = tmp_path_factory.mktemp("onnx")
    nets = {name: stir(build_backbone(name)) for name in ("resnet18_tiny", "nin3")}
    meta = {"source_sha256": "ab"}
    return {
        name: (net, export_backbone(net, folder / f"{name}.onnx", "onnx", meta))
        for name, net in nets.items()
    }


@pytest.mark.parametrize("name", ["resnet18_tiny", "nin3"])
def test_onnx_computes_the_same_for_any_batch_and_side(
    exported: dict[str, tuple[Backbone, ExportedFile]], name: str
) -> None:
    net, made = exported[name]
    model = onnx.load(made.path)
    onnx.checker.check_model(model, full_check=True)
    assert made.tensors == len(model.graph.initializer) > 5
    assert {p.key: p.value for p in model.metadata_props} == {"arch": name, "source_sha256": "ab"}
    assert str(Path(__file__).parents[3]).encode() not in made.path.read_bytes()
    images = torch.randn(3, 3, 36, 32)
    with torch.no_grad():
        last, pooled = net(images), net.pooled(images)
    found = ReferenceEvaluator(model).run(["pooled", "map"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found[1]), last, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(found[0]), pooled, rtol=1e-4, atol=1e-5)


def test_an_onnx_file_that_computes_something_else_is_not_written(
    exported: dict[str, tuple[Backbone, ExportedFile]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, made = exported["nin3"]
    translated = types.SimpleNamespace(model_proto=onnx.load(made.path))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: translated)
    export_backbone(net, tmp_path / "net.onnx", "onnx", {})
    (tmp_path / "net.onnx").unlink()
    other = copy.deepcopy(net)
    other.block3.conv3.weight.data.mul_(1.01)
    with pytest.raises(CheckpointError, match="not written: map by ONNX has a relative error of"):
        export_backbone(other, tmp_path / "net.onnx", "onnx", {})
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rotpred.weights.export, "find_spec", lambda name: None if name == "onnx" else name
    )
    with pytest.raises(ImportError, match=r"ONNX needs onnx: pip install -e '\.\[eval\]'"):
        export_backbone(stir(build_backbone("nin3")), tmp_path / "net.onnx", "onnx", {})


@pytest.mark.parametrize("name", ["nin4", "alexnet", "resnet18_small", "resnet18_tiny"])
@pytest.mark.parametrize("form", ["torchvision", "timm", "mmdet", "mmseg", "detectron2"])
def test_networks_that_a_project_does_not_have(tmp_path: Path, form: Format, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{form} has no {name} .*use safetensors or onnx"):
        export_backbone(build_backbone(name), tmp_path / "x.pth", form, {})
    assert list(tmp_path.iterdir()) == []


def test_suffixes_and_sick_weights(tmp_path: Path) -> None:
    net = build_backbone("resnet18")
    with pytest.raises(CheckpointError, match=r"a file for detectron2 must end in \.pkl"):
        export_backbone(net, tmp_path / "x.pth", "detectron2", {})
    net.bn1.weight.data[0] = float("nan")
    for form, name in (
        ("timm", "x.pth"),
        ("detectron2", "x.pkl"),
        ("safetensors", "x.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=r"not finite: bn1\.weight"):
            export_backbone(net, tmp_path / name, form, {})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


class Done(NamedTuple):
    status: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Runs scripts/export.py in this process and returns its exit status and output."""
    handler = signal.getsignal(signal.SIGTERM)

    def execute(*args: object) -> Done:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
        status = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as leave:
            status = int(str(leave.code))
        return Done(status, *capsys.readouterr())

    yield execute
    signal.signal(signal.SIGTERM, handler)


def test_the_command_converts_a_checkpoint_and_says_what_it_wrote(
    tmp_path: Path, command: Command
) -> None:
    net = make_rotnet("resnet18")
    source = CheckpointFolder(tmp_path / "run").save(
        7, {"model": net.state_dict(), "arch": "resnet18"}
    )
    output = tmp_path / "new" / "r18.pth"
    done = command(source, "--format", "torchvision", "--output", output)
    assert (done.status, done.err) == (0, "")
    assert "rotpred checkpoint: 120 tensors loaded, 2 ignored (head.fc.weight, hea" in done.out
    assert re.search(r"resnet18 for torchvision, 120 tensors, 44\.\d MB", done.out)
    assert (
        f"sha256 {sha256_file(output)}\nread it with: {reader_settings('torchvision')}\n"
        in done.out
    )
    assert equal(torch.load(output, weights_only=True), net.backbone.state_dict())
    again = command(source, "--format", "torchvision", "--output", output)
    assert again.status == 2 and "pass --overwrite" in again.err
    back = tmp_path / "back.safetensors"
    done = command(output, "--format", "safetensors", "--output", back, "--arch", "resnet18")
    assert done.status == 0
    with safetensors.safe_open(back, framework="pt") as file:
        assert file.metadata() == {"arch": "resnet18", "source_sha256": sha256_file(output)}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["absent.safetensors", "--format", "timm"], "no weights at"),
        (["nin.safetensors", "--format", "detectron2"], "detectron2 has no nin3"),
        (["nin.safetensors", "--format", "timm", "--arch", "nin4"], "weights of nin3, not of nin4"),
        (["nin.safetensors", "--format", "timm", "--arch", "vgg"], "unknown backbone 'vgg'"),
        (["cut.pth", "--format", "timm"], "damaged"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, command: Command, args: list[str], words: str
) -> None:
    save_backbone(tmp_path / "nin.safetensors", build_backbone("nin3"), {})
    (tmp_path / "cut.pth").write_bytes(b"PK")
    done = command(tmp_path / args[0], *args[1:], "--output", tmp_path / "x.pth")
    assert done.status == 2 and done.out == ""
    assert done.err.startswith("export: ") and words in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "x.pth").exists()
