"""Export pretrained weights to another project's format."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.checks import Checked
from rotpred.program import drive
from rotpred.weights.formats import Format, reader_settings


@dataclass(frozen=True)
class Arguments(Checked):
    """Export pretrained weights to another project's format.

    torchvision, timm: flat keys without fc. mmdet, mmseg: keys with the prefix `backbone.`.
    detectron2: a .pkl of arrays. All five support resnet18 and resnet50. onnx: dynamic batch and
    image sizes, output compared with torch's. onnx and safetensors support every network. The
    command prints what the other project must be configured with (color order, mean and standard
    deviation, position of the stride).
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """backbone.safetensors or checkpoints/step_N.pt of a run, or any file that --weights reads."""
    format: Format
    """Project or format to export to."""
    output: Path
    """The file to write; ends in .safetensors, .pth, .pkl (detectron2) or .onnx."""
    arch: str | None = None
    """The network, if the file is not ours and does not name it: resnet50, alexnet, nin4, ..."""
    overwrite: bool = False
    """Replace an existing output once the new one is complete."""


def main(args: Arguments) -> str:
    """Export and return a summary. User errors raise `ValueError` or `OSError`."""
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists; pass --overwrite to replace it")
    # Imports torch, which would slow down --help.
    from rotpred.weights.export import export_backbone
    from rotpred.weights.load import read_backbone

    backbone, report = read_backbone(args.checkpoint, args.arch)
    meta = {"source_sha256": report.sha256}
    made = export_backbone(backbone, args.output, args.format, meta)
    return (
        f"{args.checkpoint}: {report.summary()}\n"
        f"{made.path}: {backbone.arch} for {args.format}, {made.tensors} tensors, "
        f"{made.bytes / 1e6:.1f} MB, sha256 {made.sha256}\n"
        f"read it with: {reader_settings(args.format)}"
    )


if __name__ == "__main__":
    sys.exit(drive("export", Arguments, main))
