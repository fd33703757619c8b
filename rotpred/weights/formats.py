"""File formats of other projects that backbones are exported to, and how their readers are set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pipelines.checks import check
from pipelines.spec import CIFAR10, IMAGENET, Normalize

Format = Literal["safetensors", "torchvision", "timm", "mmdet", "mmseg", "detectron2", "onnx"]

SUFFIXES: Mapping[Format, str] = {
    "safetensors": ".safetensors",
    "torchvision": ".pth",
    "timm": ".pth",
    "mmdet": ".pth",
    "mmseg": ".pth",
    "detectron2": ".pkl",
    "onnx": ".onnx",
}
"""File name suffix of each format. detectron2 and this project choose the reader by it."""


def reader_settings(form: Format) -> str:
    """Return the settings that the other project needs, under its own option names, in one line.

    Its defaults may differ (detectron2's are BGR, standard deviation 1 and the stride in the 1 x 1
    convolution) and would silently degrade results. A weights file does not hold the normalisation
    of its pretraining, so both of our statistics are listed.

    Raises:
        ValueError: There is no such format.
    """
    check("form", form, Format)
    imagenet, cifar10 = (_statistics(form, statistics) for statistics in (IMAGENET, CIFAR10))
    return (
        f"{_INPUT_SETTINGS[form]}; mean and deviation as in pretraining: "
        f"ImageNet recipes use {imagenet}; CIFAR-10 recipes {cifar10}"
    )


_INPUT_SETTINGS: Mapping[Format, str] = {
    "safetensors": "RGB in 0..1",
    "torchvision": "RGB in 0..1",
    "timm": "RGB in 0..1",
    "mmdet": "data_preprocessor bgr_to_rgb=True, backbone style='pytorch'",
    "mmseg": "data_preprocessor bgr_to_rgb=True, backbone style='pytorch'",
    "detectron2": "INPUT.FORMAT RGB, MODEL.RESNETS.STRIDE_IN_1X1 False (not the defaults)",
    "onnx": "RGB in 0..1",
}
"""Settings of each format's reader, besides the statistics."""


def _statistics(form: Format, normalize: Normalize) -> str:
    """Return mean and standard deviation in the other project's units and option names."""
    names, unit = ("mean", "std"), 255
    match form:
        case "detectron2":
            names, unit = ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"), 1
        case "mmdet" | "mmseg":
            unit = 1
    rows = (normalize.mean, normalize.std)
    texts = (",".join(f"{round(v / unit, 4):g}" for v in row) for row in rows)
    return ", ".join(f"{name} [{text}]" for name, text in zip(names, texts, strict=True))
