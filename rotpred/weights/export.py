"""Export of backbones to the file formats of other projects."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from pipelines.checks import check
from rotpred.models.base import Backbone
from rotpred.training.checkpoint import CheckpointError
from rotpred.weights.formats import SUFFIXES, Format
from rotpred.weights.layouts import Tensors
from rotpred.weights.load import finite_tensors, save_backbone, write_whole

COMMON = ("resnet18", "resnet50")
"""Backbones that other projects have under the same names with the same layers."""

_ONNX_TEST_SHAPES = ((2, 32, 32), (1, 48, 32))
"""Batches (N, H, W) on which an ONNX file is verified: small, but AlexNet needs 31 pixels."""


class ExportedFile(NamedTuple):
    """Path, number of tensors, size and checksum of an exported file."""

    path: Path
    tensors: int
    bytes: int
    sha256: str


def export_backbone(
    backbone: Backbone, path: str | os.PathLike[str], form: Format, meta: Mapping[str, str]
) -> ExportedFile:
    """Write a backbone for another project, atomically.

    The files do not say how to normalise inputs; `formats.reader_settings` does. Formats:

    - torchvision and timm: a flat state dict without `fc`; load it with strict=False or
      num_classes=0.
    - mmdet and mmseg: `state_dict` with `backbone.` keys, for an `init_cfg` of type Pretrained with
      that prefix.
    - detectron2: its own key names in a pickle; its loader matches keys by suffix.
    - ONNX: input "images" (N, 3, H, W), float32 and normalised; outputs "map" (N, D, h, w), the
      last stage, and "pooled" (N, D), its global average. N, H and W are dynamic, and BN is folded
      into the convolutions. The outputs are compared with those of onnx's reference evaluator.

    Args:
        backbone: From `build_backbone`; set to evaluation mode.
        path: Replaced; must end in the format's suffix.
        form: The format.
        meta: Provenance, stored by safetensors, mmdet, mmseg and ONNX files.

    Raises:
        CheckpointError: The project has no such network, the suffix is wrong, weights are not
            finite, the ONNX outputs differ, or the file cannot be written.
        ValueError: There is no such format.
        ImportError: A package of the `eval` extra is missing (ONNX only).
    """
    path = Path(path)
    check("form", form, Format)
    if form not in ("safetensors", "onnx") and backbone.arch not in COMMON:
        raise CheckpointError(
            f"{form} has no {backbone.arch} (only {', '.join(COMMON)}): use safetensors or onnx"
        )
    if path.suffix != SUFFIXES[form]:
        raise CheckpointError(f"{path}: a file for {form} must end in {SUFFIXES[form]}")
    backbone.eval()
    tensors = finite_tensors(backbone)
    count = len(tensors)
    match form:
        case "safetensors":
            digest = save_backbone(path, backbone, meta)
        case "torchvision" | "timm":
            digest = write_whole(path, _torch_bytes(tensors))
        case "mmdet" | "mmseg":
            named = {f"backbone.{key}": value for key, value in tensors.items()}
            about = {**meta, "arch": backbone.arch}
            digest = write_whole(path, _torch_bytes({"state_dict": named, "meta": about}))
        case "detectron2":
            digest = write_whole(path, _detectron2_bytes(tensors))
        case "onnx":
            data, count = _onnx_bytes(backbone, meta)
            digest = write_whole(path, data)
    return ExportedFile(path, count, path.stat().st_size, digest)


def _torch_bytes(content: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def detectron2_key(key: str) -> str:
    """Translate torchvision's ResNet key to detectron2's (modeling/backbone/resnet.py)."""
    parts = key.split(".")
    if parts[0].startswith("layer"):
        parts[0] = f"res{int(parts[0][5:]) + 1}"
    else:
        parts.insert(0, "stem")
    name = (
        ".".join(parts).replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    )
    for k in (1, 2, 3):
        name = name.replace(f"bn{k}.", f"conv{k}.norm.")
    return name


class _ArrayPickler(pickle.Pickler):
    """Pickler that stores an array as a call of np.ndarray, which every version of numpy can read.

    numpy 2 itself writes the name of a private module, which numpy before 1.26 cannot import.
    """

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


def _detectron2_bytes(tensors: Tensors) -> bytes:
    model = {detectron2_key(key): value.numpy() for key, value in tensors.items()}
    buffer = io.BytesIO()
    _ArrayPickler(buffer, protocol=4).dump(
        {"model": model, "__author__": "rotpred", "matching_heuristics": True}
    )
    return buffer.getvalue()


class _WithPooled(nn.Module):
    """Backbone that returns its last feature map (N, D, h, w) and the global average (N, D)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        last = self.backbone(images)
        return last, last.mean((2, 3))


def _onnx_bytes(backbone: Backbone, meta: Mapping[str, str]) -> tuple[bytes, int]:
    """Return the verified ONNX file and its number of stored tensors."""
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise ImportError(f"ONNX needs {package}: pip install -e '.[eval]'")
    import onnx
    from onnx.reference import ReferenceEvaluator

    net = _WithPooled(backbone).eval()
    program = torch.onnx.export(
        net,
        (torch.zeros(2, 3, 64, 64),),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["map", "pooled"],
        dynamic_shapes=({0: "N", 2: "H", 3: "W"},),
    )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # source paths on this machine
    onnx.helper.set_model_props(model, {**meta, "arch": backbone.arch})
    onnx.checker.check_model(model, full_check=True)
    evaluator = ReferenceEvaluator(model)
    generator = torch.Generator().manual_seed(0)
    for count, height, width in _ONNX_TEST_SHAPES:
        images = torch.randn(count, 3, height, width, generator=generator)
        with torch.no_grad():
            expected = net(images)
        computed = evaluator.run(None, {"images": images.numpy()})
        for name, ours, theirs in zip(("map", "pooled"), expected, computed, strict=True):
            error = float((ours - torch.from_numpy(theirs)).abs().max() / ours.abs().max())
            if not error < 1e-4:
                raise CheckpointError(
                    f"not written: {name} by ONNX has a relative error of {error:.1e}"
                )
    return model.SerializeToString(), len(model.graph.initializer)
