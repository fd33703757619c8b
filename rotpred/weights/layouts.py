"""Weights files of all layouts that are known: which one it is, and its tensors by our names.

Key names are those of the projects' sources (named at each table). A file is recognised by its
keys, not by its name. Reading one runs no code that it may hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch

from rotpred.files import CheckpointError, load_plain
from rotpred.training.checkpoint import load, sidecar_of

Tensors = dict[str, torch.Tensor]

CONTAINERS = ("model", "state_dict", "network", "model_state_dict", "classy_state_dict")
"""Where files keep their state dict: ours; OpenMMLab, MoCo and timm; the RotNet authors; VISSL's
converted AlexNet; VISSL's training. Without any of them the file is the state dict."""

BOOKKEEPING = (
    "__builtin__.getattr",
    "argparse.Namespace",
    "builtins.getattr",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
)
"""Types that training programs save beside the tensors (options, curves). Nothing of them is needed
or made: each becomes a `_Nothing`, mmengine's `getattr` of its buffers' methods as well, so that
nothing is looked up or called. Any other type in a file is refused."""


class _Nothing:
    """Stands where a file holds something of no use; takes every argument and keeps none."""

    def __new__(cls, *_: object) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class KeyLayout:
    """How a project names things; keys of tables are prefixes in the file, the longest one wins."""

    name: str
    backbone: Mapping[str, str]
    """Prefixes of the backbone's keys -> of ours."""
    head: Mapping[str, str]
    """Prefixes of the rotation head's keys -> of our head's (without `head.`)."""
    others: tuple[str, ...] = ()
    """More prefixes of keys that neither needs."""
    clockwise: bool | None = False
    """Whether label 1 is a quarter turn clockwise; None: the file may tell."""


@dataclass(frozen=True)
class StateDictFile:
    """What a file holds."""

    layout: str
    """Its layout in words."""
    arch: str | None
    """The name of our backbone, where the file is ours and says so."""
    backbone: Tensors
    """By our keys, as far as the layout's table goes; nothing is checked against a network yet."""
    head: Tensors
    """The rotation head by the keys of `RotNet.head`; empty without one."""
    head_keys: tuple[str, ...]
    """Its keys in the file."""
    ignored: tuple[str, ...]
    """Keys in the file that neither needs."""
    unknown: tuple[str, ...]
    """Keys in the file that its layout does not have."""
    clockwise: bool | None
    """Whether the head's class 1 is a quarter turn clockwise (ours: counter-clockwise, False)."""


def read(path: Path) -> StateDictFile:
    """Read a file of any known layout.

    Known are: our safetensors and training checkpoints, flat state dicts of torchvision, timm and
    converted VISSL files, mmselfsup 0.x and 1.x whole or extracted, VISSL, MoCo v1 to v3, SimSiam,
    and the files of the RotNet authors (AlexNet and NIN); theirs as torch files or safetensors, and
    with `module.` before the keys as well.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged, unsafe, or no state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        tensors, arch = _read_safetensors(path)
        layout = _recognise(tensors, ours=False) if arch is None else replace(_FLAT, name="rotpred")
        return _sort(layout, tensors, arch, clockwise=layout.clockwise)
    if path.suffix == ".pkl":
        raise CheckpointError(f"{path} is a pickle, which can run code: only written, never read")
    content = _read_torch(path)
    containers = [key for key in CONTAINERS if isinstance(content.get(key), dict)]
    if len(containers) > 1:
        raise CheckpointError(f"{path} holds several state dicts: {', '.join(containers)}")
    container = containers[0] if containers else ""
    tensors = content[container] if container else content
    if container == "classy_state_dict":
        tensors = _classy(path, tensors)
    odd = [str(key) for key, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise CheckpointError(f"{path} is no state dict: {some(odd)} are not tensors")
    arch = content.get("arch") if container == "model" else None  # MoCo's name torchvision's
    ours = isinstance(arch, str)
    layout = _recognise(tensors, ours=ours)
    clockwise = _tells_clockwise(content) if layout.clockwise is None else layout.clockwise
    return _sort(layout, tensors, arch if ours else None, clockwise=clockwise)


def some(keys: list[str] | tuple[str, ...]) -> str:
    """The first few of many keys, for messages."""
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


# torchvision/models/resnet.py; timm/models/resnet.py has the same names for the same networks.
_FLAT = KeyLayout("flat keys (torchvision, timm)", {"": ""}, {}, ("fc.", "head."), None)

_OURS = KeyLayout("rotpred checkpoint", {"backbone.": ""}, {"head.": ""})

# mmselfsup: models/algorithms/base.py, models/heads/cls_head.py.
_OPENMMLAB = KeyLayout(
    "backbone and head (mmselfsup)",
    {"backbone.": ""},
    {"head.fc_cls.": "fc."},
    ("head.",),
    None,
)

# moco/builder.py of MoCo and of MoCo v3, simsiam/builder.py: an encoder among other networks, whose
# fc is a projection and no rotation head.
_ENCODERS = tuple(
    KeyLayout(name, {stem: ""}, {}, (f"{stem}fc.", *others))
    for name, stem, *others in (
        ("MoCo", "encoder_q.", "encoder_k.", "queue"),
        ("MoCo v3", "base_encoder.", "momentum_encoder.", "predictor."),
        ("SimSiam", "encoder.", "predictor."),
    )
)


def _alexnet(stem: str) -> KeyLayout:
    """architectures/AlexNet.py of the authors, vissl/models/trunks/alexnet_rotnet.py."""
    return KeyLayout(
        "RotNet authors' AlexNet",
        {
            f"{stem}{block}.{k}.": f"{part}{stage}."
            for stage, block in enumerate((0, 2, 4, 5, 6), start=1)
            for k, part in enumerate(("conv", "bn"))
        },
        {
            f"{stem}8.1.": "fc6.",
            f"{stem}8.2.": "bn6.",
            f"{stem}8.4.": "fc7.",
            f"{stem}8.5.": "bn7.",
            f"{stem}9.0.": "fc.",
        },
        ("heads.",),
    )


def _nin(stem: str) -> KeyLayout:
    """architectures/NetworkInNetwork.py of the authors, whose files have as many blocks as stages.

    The keys do not show whether block 3 ends in a pool (`use_avg_on_conv3`); it does not here, nor
    in the authors' rotation configuration.
    """
    return KeyLayout(
        "RotNet authors' NIN",
        {
            f"{stem}{k - 1}.Block{k}_ConvB{j}.layers.{theirs}.": f"block{k}.{part}{j}."
            for k in range(1, 6)
            for j in range(1, 4)
            for theirs, part in (("Conv", "conv"), ("BatchNorm", "bn"))
        },
        {f"{stem}{blocks}.Classifier.": "fc." for blocks in (3, 4, 5)},
    )


def _vissl(stem: str) -> KeyLayout:
    """vissl/models/trunks/resnext.py, and its heads as `_classy` names them."""
    return KeyLayout("VISSL", {stem: ""}, {"heads.0.clf.0.": "fc."}, ("heads.",))


def _recognise(tensors: Tensors, *, ours: bool) -> KeyLayout:
    """The layout, with the prefix that torch's DistributedDataParallel gives to all keys if any.

    Most keys decide on it, so that a message names the stray one, which `_sort` finds unknown.
    """
    prefixed = [key for key in tensors if key.startswith("module.")]
    wrapper = "module." if 2 * len(prefixed) > len(tensors) else ""
    layout = _layout([key.removeprefix(wrapper) for key in tensors], ours=ours)
    backbone, head = (
        {wrapper + prefix: name for prefix, name in table.items()}
        for table in (layout.backbone, layout.head)
    )
    others = tuple(wrapper + prefix for prefix in layout.others)
    return replace(layout, backbone=backbone, head=head, others=others)


def _layout(keys: list[str], *, ours: bool) -> KeyLayout:
    for stem in ("_feature_blocks.", "trunk._feature_blocks.", "trunk.base_model._feature_blocks."):
        inner = [key.removeprefix(stem) for key in keys if key.startswith(stem)]
        if any(key.startswith("0.Block1_ConvB1.") for key in inner):
            return _nin(stem)
        if any(key.startswith("0.0.") for key in inner):
            return _alexnet(stem)
        if inner:
            return _vissl(stem)
    for layout in _ENCODERS:
        if any(key.startswith(tuple(layout.backbone)) for key in keys):
            return layout
    if any(key.startswith("backbone.") for key in keys):
        return _OURS if ours else _OPENMMLAB
    return _FLAT


def _sort(
    layout: KeyLayout, tensors: Tensors, arch: str | None, *, clockwise: bool | None
) -> StateDictFile:
    kinds = dict.fromkeys(layout.others, ("others", ""))
    kinds |= {prefix: ("head", name) for prefix, name in layout.head.items()}
    kinds |= {prefix: ("backbone", name) for prefix, name in layout.backbone.items()}
    longest_first = sorted(kinds, key=len, reverse=True)
    parts: dict[str, Tensors] = {"backbone": {}, "head": {}, "others": {}, "unknown": {}}
    keys: dict[str, list[str]] = {part: [] for part in parts}
    for key, tensor in tensors.items():
        prefix = next((prefix for prefix in longest_first if key.startswith(prefix)), None)
        part, name = kinds[prefix] if prefix is not None else ("unknown", "")
        name += key.removeprefix(prefix or "")
        if name in parts[part] and part != "others":
            raise CheckpointError(f"{key} is a second {name} of the {part}")
        keys[part].append(key)
        parts[part][name] = tensor
    return StateDictFile(
        layout.name,
        arch,
        parts["backbone"],
        parts["head"],
        head_keys=tuple(keys["head"]),
        ignored=tuple(keys["others"]),
        unknown=tuple(keys["unknown"]),
        clockwise=clockwise,
    )


def _tells_clockwise(content: Mapping[str, Any]) -> bool | None:
    """mmselfsup 1.x turned to clockwise; its runner, mmengine, signs files. 0.x signs itself."""
    given = content.get("meta")
    meta: Mapping[str, Any] = given if isinstance(given, dict) else {}
    version = str(meta.get("mmselfsup_version", ""))
    if "mmengine_version" in meta or "message_hub" in content or version.startswith("1."):
        return True
    if "openselfsup_version" in meta or version.startswith("0."):
        return False
    return None


def _classy(path: Path, content: Mapping[str, Any]) -> Tensors:
    """The parts of a VISSL training file, by the names that the live model has."""
    try:
        model = content["base_model"]["model"]
        parts = {"trunk": model["trunk"], "heads": model["heads"]}
        return {f"{part}.{k}": value for part, keys in parts.items() for k, value in keys.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected trunk and heads in classy_state_dict > base_model > model"
        ) from error


def _read_safetensors(path: Path) -> tuple[Tensors, str | None]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            return tensors, (file.metadata() or {}).get("arch")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, Any]:
    if path.match("step_*.pt") and sidecar_of(path).exists():
        return load(path).state
    try:
        with torch.serialization.safe_globals([(_Nothing, name) for name in BOOKKEEPING]):
            return load_plain(path, "cpu")
    except CheckpointError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error.__cause__))
        if found is None:
            raise
        raise CheckpointError(
            f"{path} holds more than tensors and plain types: a {found[1]}, which may run code. If "
            "you trust the file, torch.load it with weights_only=False and torch.save its state "
            "dict alone"
        ) from error
