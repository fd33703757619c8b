"""Backbone weights: exported with torchvision's keys, imported only where they fit completely."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch

from rotpred.backbone import Backbone
from rotpred.checkpoint import load, sidecar_of
from rotpred.durable import (
    CheckpointError,
    check_space,
    load_plain,
    replace,
    sha256_file,
    write_verified,
)

__all__ = ["LoadReport", "load_backbone", "save_backbone", "sha256_file"]

KNOWN_HEADS = ("head.", "fc.")
"""Prefixes of keys that a backbone does without: our own and mmselfsup's heads, torchvision's."""


class LoadReport(NamedTuple):
    """What `load_backbone` did, by keys of the backbone (loaded, missing) or the file (ignored)."""

    loaded: tuple[str, ...]
    ignored: tuple[str, ...]
    """Keys of a known head."""
    missing: tuple[str, ...]
    """BN step counters that older files lack; nothing computes with them. Else empty."""
    sha256: str
    """Of the file, for the results' provenance."""


def save_backbone(path: Path, backbone: Backbone, meta: Mapping[str, str]) -> str:
    """Write a backbone's weights as safetensors with its own (torchvision's) keys.

    Args:
        path: replaced as a whole or not at all.
        backbone: on any device, in any memory format.
        meta: provenance for the file's header; the name of the architecture is added as "arch".

    Returns:
        The file's SHA-256. Equal weights and equal meta give equal files.

    Raises:
        CheckpointError: weights that are not finite, or no space.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
    sick = [key for key, value in tensors.items() if not bool(value.isfinite().all())]
    if sick:
        raise CheckpointError(f"not written, because of values that are not finite: {_some(sick)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = _sorted_header(safetensors.torch.save(tensors, {**meta, "arch": backbone.arch}))
    check_space(path.parent, len(data))
    temporary, digest = write_verified(path, lambda file: file.write(data))
    replace(temporary, path)
    return digest


def load_backbone(backbone: Backbone, path: Path) -> LoadReport:
    """Fill a backbone from a file, completely or not at all.

    Read are: our safetensors; our training checkpoints and mmselfsup's files (`model` or
    `state_dict` within, prefix `backbone.`); flat state dicts with torchvision's keys.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged or unsafe file, another architecture, missing or unknown keys,
            other shapes, values that are not finite. The backbone is unchanged then.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    tensors, arch = _read_weights(path)
    if arch is not None and arch != backbone.arch:
        raise CheckpointError(f"{path} holds weights of {arch}, not of {backbone.arch}")
    prefix = "backbone." if any(key.startswith("backbone.") for key in tensors) else ""
    own = backbone.state_dict()
    given = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    heads = [k for k in tensors if k.startswith(KNOWN_HEADS) and k not in own]
    expected = {*heads, *(prefix + k for k in own)}
    unknown = [k for k in tensors if k not in expected]
    missing = [k for k in own if k not in given]
    counters = [k for k in missing if k.endswith(".num_batches_tracked")]
    shared = [k for k in own if k in given]
    problems = {
        "missing": [k for k in missing if k not in counters],
        "unknown": unknown,
        "of another shape or type": [
            f"{k} {tuple(given[k].shape)}, expected {tuple(own[k].shape)}"
            for k in shared
            if given[k].shape != own[k].shape
            or given[k].is_floating_point() != own[k].is_floating_point()
        ],
        "not finite": [k for k in shared if not bool(given[k].isfinite().all())],
    }
    words = [f"{len(keys)} {what} ({_some(keys)})" for what, keys in problems.items() if keys]
    if words:
        raise CheckpointError(f"{path} does not fit {backbone.arch}: {'; '.join(words)}")
    backbone.load_state_dict({**{k: own[k] for k in counters}, **{k: given[k] for k in shared}})
    return LoadReport(tuple(shared), tuple(heads), tuple(counters), sha256_file(path))


def _sorted_header(data: bytes) -> bytes:
    """Put the header of safetensors in order: the library writes metadata in a random one.

    Layout: length of the header (8 bytes, little-endian), JSON padded with spaces, the tensors.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    """Return the state dict in a file, and the architecture if the file names it."""
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
                return tensors, (file.metadata() or {}).get("arch")
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error
    content = load(path).state if sidecar_of(path).exists() else load_plain(path, "cpu")
    arch = content.get("arch")
    for container in ("model", "state_dict"):
        if isinstance(content.get(container), dict):
            content = content[container]
            break
    odd = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise CheckpointError(f"{path} is no state dict: {_some(odd)} are not tensors")
    return content, arch if isinstance(arch, str) else None


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
