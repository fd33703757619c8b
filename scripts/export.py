"""Write pretrained weights for another project."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rotpred.program import drive
from rotpred.weights.export import Format, export_backbone, reading
from rotpred.weights.load import read_backbone


@dataclass(frozen=True)
class Arguments:
    """Write pretrained weights for another project.

    torchvision, timm: flat keys without fc. mmdet, mmseg: keys with the prefix `backbone.`.
    detectron2: a .pkl of arrays. onnx: dynamic batch and sides, checked against torch. These but
    onnx take resnet18 and resnet50; safetensors and onnx take every network. What the other project
    must be told (order of colors, mean and deviation, place of the stride) is printed in the end.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """backbone.safetensors or checkpoints/step_N.pt of a run, or any file that --weights reads."""
    format: Format
    """Whose layout to write."""
    output: Path
    """The file to write; ends in .safetensors, .pth, .pkl (detectron2) or .onnx."""
    arch: str | None = None
    """The network, where the file is not ours and does not name it: resnet50, alexnet, nin4, ..."""
    overwrite: bool = False
    """Replace an existing output, once the new one is complete."""


def main(args: Arguments) -> str:
    """Do what is asked for and return lines about it; `ValueError` or `OSError` in words."""
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists: give --overwrite to replace it")
    backbone, report = read_backbone(args.checkpoint, args.arch)
    meta = {"source_sha256": report.sha256}
    made = export_backbone(backbone, args.output, args.format, meta)
    return (
        f"{args.checkpoint}: {report.words()}\n"
        f"{made.path}: {backbone.arch} for {args.format}, {made.tensors} tensors, "
        f"{made.bytes / 1e6:.1f} MB, sha256 {made.sha256}\n"
        f"read it with: {reading(args.format)}"
    )


if __name__ == "__main__":
    sys.exit(drive("export", Arguments, main))
