"""State-dict files of any known layout: read without running code, sorted into backbone and head.

A file is recognised by its keys, not by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch

from rotpred.training.checkpoint import CheckpointError, load, load_plain, sidecar_of
from rotpred.weights.layouts import FLAT, KeyLayout, Tensors, recognise_layout

CONTAINERS = ("model", "state_dict", "network", "model_state_dict", "classy_state_dict")
"""Keys under which files keep their state dict: ours; OpenMMLab, MoCo and timm; the RotNet authors;
VISSL's converted AlexNet; VISSL's training. A file without any of them is itself the state dict."""

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
"""Types that training programs save beside the tensors (options, curves). We need none of them, so
each is unpickled as a `_Placeholder`. That includes the `getattr` with which mmengine pickles
methods of its buffers: nothing is looked up or called. A file with any other type is refused."""


class _Placeholder:
    """Inert stand-in for pickled objects that we do not need: takes any arguments, keeps none."""

    def __new__(cls, *_: object) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class StateDictFile:
    """Contents of a state-dict file, with keys translated to ours."""

    layout: str
    """Name of its layout."""
    arch: str | None
    """Name of the backbone if the file is ours and has it, else None."""
    tensors: Tensors
    """By the keys of `RotNet`, as far as the layout goes; not yet checked against a network."""
    head_keys: tuple[str, ...]
    """Keys of the rotation head in the file; empty without one."""
    ignored: tuple[str, ...]
    """Keys in the file that neither backbone nor head needs."""
    unknown: tuple[str, ...]
    """Keys in the file that its layout does not have."""
    clockwise: bool | None
    """Whether the head's class 1 is a quarter turn clockwise (ours: counter-clockwise, False)."""


def read_state_dict(path: Path) -> StateDictFile:
    """Read a file of any known layout.

    Known layouts: our safetensors and training checkpoints; flat state dicts of torchvision, timm
    and converted VISSL files; mmselfsup 0.x and 1.x, whole or extracted; VISSL; MoCo v1 to v3;
    SimSiam; the RotNet authors' files (AlexNet and NIN). Files of other projects may be torch files
    or safetensors, and their keys may start with `module.`.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, unsafe, or not a state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        tensors, arch = _read_safetensors(path)
        ours = replace(FLAT, name="rotpred")
        layout = recognise_layout(tensors, ours=False) if arch is None else ours
        return _split(layout, tensors, arch, clockwise=layout.clockwise)
    if path.suffix == ".pkl":
        raise CheckpointError(f"{path} is a pickle, which can run code: only written, never read")
    content = _read_torch(path)
    containers = [key for key in CONTAINERS if isinstance(content.get(key), dict)]
    if len(containers) > 1:
        raise CheckpointError(f"{path} holds several state dicts: {', '.join(containers)}")
    container = containers[0] if containers else ""
    tensors = content[container] if container else content
    if container == "classy_state_dict":
        tensors = _classy_tensors(path, tensors)
    odd = [str(key) for key, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise CheckpointError(f"{path} is not a state dict: {first_few(odd)} are not tensors")
    # Only ours: MoCo's "arch" is torchvision's name.
    arch = content.get("arch") if container == "model" else None
    ours_named = isinstance(arch, str)
    layout = recognise_layout(tensors, ours=ours_named)
    clockwise = _clockwise_by_version(content) if layout.clockwise is None else layout.clockwise
    return _split(layout, tensors, arch if ours_named else None, clockwise=clockwise)


def first_few(keys: list[str] | tuple[str, ...]) -> str:
    """Return the first three keys as text for a message, with an ellipsis if there are more."""
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _split(
    layout: KeyLayout, tensors: Tensors, arch: str | None, *, clockwise: bool | None
) -> StateDictFile:
    """Translate the keys, and find those that are ignored or unknown.

    Raises:
        CheckpointError: Two keys translate to the same key of ours.
    """
    longest_first = sorted(layout.prefixes, key=len, reverse=True)
    found: Tensors = {}
    head_keys, ignored, unknown = [], [], []
    for key, tensor in tensors.items():
        prefix = next((prefix for prefix in longest_first if key.startswith(prefix)), None)
        if prefix is None:
            unknown.append(key)
        elif (ours := layout.prefixes[prefix]) is None:
            ignored.append(key)
        else:
            name = ours + key.removeprefix(prefix)
            if name in found:
                raise CheckpointError(f"{key} is a second {name}")
            found[name] = tensor
            if name.startswith("head."):
                head_keys.append(key)
    return StateDictFile(
        layout.name, arch, found, tuple(head_keys), tuple(ignored), tuple(unknown), clockwise
    )


def _clockwise_by_version(content: Mapping[str, Any]) -> bool | None:
    """Return whether a mmselfsup file's labels turn clockwise; None if its version is unknown.

    1.x turns clockwise, and its runner, mmengine, marks its files. 0.x writes its own version.
    """
    given = content.get("meta")
    meta: Mapping[str, Any] = given if isinstance(given, dict) else {}
    version = str(meta.get("mmselfsup_version", ""))
    if "mmengine_version" in meta or "message_hub" in content or version.startswith("1."):
        return True
    if "openselfsup_version" in meta or version.startswith("0."):
        return False
    return None


def _classy_tensors(path: Path, content: Mapping[str, Any]) -> Tensors:
    """Return the tensors of a VISSL training file under the live model's names."""
    try:
        model = content["base_model"]["model"]
        parts = {"trunk": model["trunk"], "heads": model["heads"]}
        return {f"{part}.{k}": value for part, keys in parts.items() for k, value in keys.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected trunk and heads in classy_state_dict > base_model > model"
        ) from error


def _read_safetensors(path: Path) -> tuple[Tensors, str | None]:
    """Return the tensors, and the name of the backbone if the header has it."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            return tensors, (file.metadata() or {}).get("arch")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, Any]:
    if path.match("step_*.pt") and sidecar_of(path).exists():
        return load(path).state
    try:
        with torch.serialization.safe_globals([(_Placeholder, name) for name in BOOKKEEPING]):
            return load_plain(path)
    except CheckpointError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error.__cause__))
        if found is None:
            raise
        raise CheckpointError(
            f"{path} holds more than tensors and plain types: a {found[1]}, which may run code. If "
            "you trust the file, torch.load it with weights_only=False and torch.save its state "
            "dict alone"
        ) from error
