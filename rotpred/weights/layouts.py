"""Key layouts of weights files: how each project names the tensors of backbone and rotation head.

Key names are those of the projects' sources, which are named at each table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class KeyLayout:
    """A project's key names."""

    name: str
    prefixes: Mapping[str, str | None]
    """Prefix of a key in the file -> ours in `RotNet`, which starts with backbone. or head.; None
    if neither needs the key. The longest prefix that matches a key decides."""
    clockwise: bool | None = False
    """Whether label 1 is a quarter turn clockwise; None: it depends on the project's version."""


FLAT = KeyLayout(
    "flat keys (torchvision, timm)", {"": "backbone.", "fc.": None, "head.": None}, None
)
"""torchvision/models/resnet.py; timm/models/resnet.py names the same networks alike."""

_OURS = KeyLayout("rotpred checkpoint", {"backbone.": "backbone.", "head.": "head."})

# mmselfsup: models/algorithms/base.py, models/heads/cls_head.py.
_OPENMMLAB = KeyLayout(
    "backbone and head (mmselfsup)",
    {"backbone.": "backbone.", "head.fc_cls.": "head.fc.", "head.": None},
    None,
)

# moco/builder.py of MoCo and of MoCo v3, simsiam/builder.py: an encoder among other networks. Its
# fc is a projection, not a rotation head.
_ENCODERS = tuple(
    KeyLayout(name, {stem: "backbone.", **dict.fromkeys((f"{stem}fc.", *others))})
    for name, stem, *others in (
        ("MoCo", "encoder_q.", "encoder_k.", "queue"),
        ("MoCo v3", "base_encoder.", "momentum_encoder.", "predictor."),
        ("SimSiam", "encoder.", "predictor."),
    )
)


def _alexnet(stem: str) -> KeyLayout:
    """The authors' architectures/AlexNet.py and vissl/models/trunks/alexnet_rotnet.py."""
    return KeyLayout(
        "RotNet authors' AlexNet",
        {
            f"{stem}{block}.{k}.": f"backbone.{part}{stage}."
            for stage, block in enumerate((0, 2, 4, 5, 6), start=1)
            for k, part in enumerate(("conv", "bn"))
        }
        | {
            f"{stem}8.1.": "head.fc6.",
            f"{stem}8.2.": "head.bn6.",
            f"{stem}8.4.": "head.fc7.",
            f"{stem}8.5.": "head.bn7.",
            f"{stem}9.0.": "head.fc.",
            "heads.": None,
        },
    )


def _nin(stem: str) -> KeyLayout:
    """The authors' architectures/NetworkInNetwork.py; their files have one block per stage.

    The keys do not show whether block 3 ends in a pool (`use_avg_on_conv3`). Ours does not, nor
    does the authors' rotation configuration.
    """
    return KeyLayout(
        "RotNet authors' NIN",
        {
            f"{stem}{k - 1}.Block{k}_ConvB{j}.layers.{theirs}.": f"backbone.block{k}.{part}{j}."
            for k in range(1, 6)
            for j in range(1, 4)
            for theirs, part in (("Conv", "conv"), ("BatchNorm", "bn"))
        }
        | {f"{stem}{blocks}.Classifier.": "head.fc." for blocks in (3, 4, 5)},
    )


def _vissl(stem: str) -> KeyLayout:
    """vissl/models/trunks/resnext.py; heads are named as `read._classy_tensors` names them."""
    return KeyLayout("VISSL", {stem: "backbone.", "heads.0.clf.0.": "head.fc.", "heads.": None})


def recognise_layout(tensors: Tensors, *, ours: bool) -> KeyLayout:
    """Return the layout of a state dict, recognised by its keys.

    If most keys start with DistributedDataParallel's `module.`, so do the layout's prefixes. A
    stray key without it is then unknown, and a message can name it.

    Args:
        tensors: By the file's keys; any shapes.
        ours: The file is one of our training checkpoints.
    """
    prefixed = [key for key in tensors if key.startswith("module.")]
    wrapper = "module." if 2 * len(prefixed) > len(tensors) else ""
    layout = _layout_of([key.removeprefix(wrapper) for key in tensors], ours=ours)
    prefixes = {wrapper + prefix: name for prefix, name in layout.prefixes.items()}
    return replace(layout, prefixes=prefixes)


def _layout_of(keys: list[str], *, ours: bool) -> KeyLayout:
    for stem in ("_feature_blocks.", "trunk._feature_blocks.", "trunk.base_model._feature_blocks."):
        inner = [key.removeprefix(stem) for key in keys if key.startswith(stem)]
        if any(key.startswith("0.Block1_ConvB1.") for key in inner):
            return _nin(stem)
        if any(key.startswith("0.0.") for key in inner):
            return _alexnet(stem)
        if inner:
            return _vissl(stem)
    for layout in _ENCODERS:
        stem = next(iter(layout.prefixes))
        if any(key.startswith(stem) for key in keys):
            return layout
    if any(key.startswith("backbone.") for key in keys):
        return _OURS if ours else _OPENMMLAB
    return FLAT
