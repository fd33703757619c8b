"""Saving and loading weights: files of ours and of other projects, loaded only if all keys fit."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torchvision
from torch import nn

from pipelines.storage import replaced, sha256_file, write_verified
from rotpred.models.backbone import build_backbone
from rotpred.models.base import Backbone
from rotpred.models.heads import RotNet
from rotpred.training.checkpoint import CheckpointError
from rotpred.weights.layouts import Tensors
from rotpred.weights.read import StateDictFile, first_few, read_state_dict

logger = logging.getLogger(__name__)

SUPERVISED = ("resnet18", "resnet50")
"""Backbones for which torchvision has weights trained on ImageNet with labels."""

_DOWNLOAD_TIMEOUT_S = 60.0


class LoadReport(NamedTuple):
    """Result of loading. Keys are the network's (loaded, missing) or the file's (ignored)."""

    loaded: tuple[str, ...]
    ignored: tuple[str, ...]
    """Heads, and other parts that the layout is known to have."""
    missing: tuple[str, ...]
    """Only BN step counters, which older files lack and no computation uses."""
    sha256: str
    """SHA-256 of the file, for the results' provenance."""
    layout: str
    """Name of the layout that was recognised."""

    def summary(self) -> str:
        """Return one line for the log."""
        parts = {"ignored": self.ignored, "missing": self.missing}
        more = [
            f"{len(k)} {what}" + (f" ({first_few(k)})" if k else "") for what, k in parts.items()
        ]
        return f"{self.layout}: {len(self.loaded)} tensors loaded, {', '.join(more)}"


def save_backbone(path: str | os.PathLike[str], backbone: Backbone, meta: Mapping[str, str]) -> str:
    """Write a backbone's weights as safetensors with its own (torchvision's) keys.

    Args:
        path: Replaced atomically.
        backbone: On any device, in any memory format.
        meta: Provenance for the file's header; the name of the architecture is added as "arch".

    Returns:
        The file's SHA-256. Equal weights and equal meta give equal files.

    Raises:
        CheckpointError: Weights are not finite, or there is no space.
    """
    tensors = finite_tensors(backbone)
    data = _sorted_header(safetensors.torch.save(tensors, {**meta, "arch": backbone.arch}))
    return write_whole(Path(path), data)


def finite_tensors(backbone: Backbone) -> Tensors:
    """Return the state dict for a file: on the CPU and contiguous, shapes and dtypes unchanged.

    Raises:
        CheckpointError: A value is not finite.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
    not_finite = [key for key, value in tensors.items() if not bool(value.isfinite().all())]
    if not_finite:
        raise CheckpointError(f"not written: values are not finite: {first_few(not_finite)}")
    return tensors


def write_whole(path: Path, data: bytes) -> str:
    """Write a file atomically, creating its folder if needed; return its SHA-256.

    Raises:
        CheckpointError: There is no space, or the data read back differ from those written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path, size=len(data)) as temporary:
            return write_verified(temporary, data)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def load_backbone(backbone: Backbone, path: str | os.PathLike[str]) -> LoadReport:
    """Load a backbone from a file of any layout that `read_state_dict` knows.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged, unsafe or of another architecture, keys are missing or
            unknown, shapes differ, or values are not finite. The backbone is then unchanged.
    """
    path = Path(path)
    return _fill_backbone(backbone, path, read_state_dict(path))


def read_backbone(
    path: str | os.PathLike[str], arch: str | None = None
) -> tuple[Backbone, LoadReport]:
    """Build the backbone that a file holds, and load it.

    Args:
        path: As for `load_backbone`.
        arch: One of `BACKBONES`; None if the file is ours and names it.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: As for `load_backbone`, or the architecture is unknown.
    """
    path = Path(path)
    found = read_state_dict(path)
    arch = arch or found.arch
    if arch is None:
        raise CheckpointError(
            f"{path} does not name its architecture: pass it (--arch of export.py, --backbone of "
            "report.py)"
        )
    backbone = build_backbone(arch)
    return backbone, _fill_backbone(backbone, path, found)


def imagenet_file(arch: str) -> Path:
    """Return the path of torchvision's supervised weights (IMAGENET1K_V1); download if missing.

    The file lies in torchvision's own cache (torch.hub, TORCH_HOME). Its name holds the start of
    its checksum, which is verified after a download and for a file found there.

    Raises:
        ValueError: torchvision has no weights for this network, or the download fails.
        CheckpointError: The file does not have the checksum in its name.
    """
    if arch not in SUPERVISED:
        raise ValueError(
            f"torchvision has no supervised weights for {arch} (only {', '.join(SUPERVISED)}): "
            "give --weights FILE or --weights random"
        )
    url: str = torchvision.models.get_weight(f"ResNet{arch[6:]}_Weights.IMAGENET1K_V1").url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    start = path.stem.rpartition("-")[2]
    if not path.exists():
        logger.info("downloading %s to %s", url, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)  # torch's download has no timeout of its own
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=start, progress=False)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"no supervised weights ({error}): save {url} as {path}, or give --weights FILE or "
                "--weights random"
            ) from error
        finally:
            socket.setdefaulttimeout(before)
    if not sha256_file(path).startswith(start):
        raise CheckpointError(f"{path} is damaged: remove it, and it will be downloaded again")
    return path


def load_rotnet(net: RotNet, path: Path, *, clockwise: bool | None = None) -> LoadReport:
    """Load a backbone and its rotation head, to score the pretext task or train it further.

    A head that counts quarter turns clockwise gets its classes 1 and 3 swapped. Ours count
    counter-clockwise, as do the authors', VISSL's and those of mmselfsup 0.x. mmselfsup 1.x counts
    clockwise (its processing.py turns with mmcv's `imrotate`).

    Args:
        net: From `make_rotnet`.
        path: Our training checkpoint, or a complete file of mmselfsup, VISSL or the authors.
        clockwise: Direction in which the file's head counts. Required if the file does not show it
            (mmselfsup's without `meta`); must agree if it does.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: As for `load_backbone`, the file has no rotation head, or its direction is
            unknown or contradicts `clockwise`. The network is then unchanged.
    """
    found = read_state_dict(path)
    if not found.head_keys:
        raise CheckpointError(f"{path} ({found.layout}) holds no rotation head")
    if found.clockwise is None and clockwise is None:
        raise CheckpointError(
            f"{path} ({found.layout}): the direction of its rotation labels is unknown; pass "
            "--labels clockwise (mmselfsup 1.x) or --labels counter-clockwise (0.x)"
        )
    if None not in (found.clockwise, clockwise) and found.clockwise != clockwise:
        raise CheckpointError(
            f"{path} ({found.layout}): its rotation labels are "
            f"{'' if found.clockwise else 'counter-'}clockwise, which contradicts --labels"
        )
    given = dict(found.tensors)
    if found.clockwise or clockwise:
        for key in {"head.fc.weight", "head.fc.bias"} & given.keys():
            if (shape := given[key].shape[:1]) != (4,):
                raise CheckpointError(f"{path}: expected 4 rotations in the head, found {shape}")
            given[key] = given[key][[0, 3, 2, 1]]  # 90 and 270 degrees change places
    return _fill(net, net.backbone.arch, path, found, given, found.ignored)


def _fill_backbone(backbone: Backbone, path: Path, found: StateDictFile) -> LoadReport:
    given = {
        key.removeprefix("backbone."): tensor
        for key, tensor in found.tensors.items()
        if key.startswith("backbone.")
    }
    return _fill(backbone, backbone.arch, path, found, given, found.head_keys + found.ignored)


def _fill(
    net: nn.Module,
    arch: str,
    path: Path,
    found: StateDictFile,
    given: Tensors,
    ignored: tuple[str, ...],
) -> LoadReport:
    """Load `given` into a network; raise without changing it if anything does not fit.

    Raises:
        CheckpointError: As for `load_backbone`.
    """
    if found.arch is not None and found.arch != arch:
        raise CheckpointError(f"{path} holds weights of {found.arch}, not of {arch}")
    own: Tensors = net.state_dict()
    missing = [k for k in own if k not in given]
    counters = [k for k in missing if k.endswith(".num_batches_tracked")]
    shared = [k for k in own if k in given]
    problems = {
        "missing": [k for k in missing if k not in counters],
        "unknown": [*found.unknown, *(k for k in given if k not in own)],
        "of another shape or type": [
            f"{k} {tuple(given[k].shape)}, expected {tuple(own[k].shape)}"
            for k in shared
            if given[k].shape != own[k].shape
            or given[k].is_floating_point() != own[k].is_floating_point()
        ],
        "not finite": [k for k in shared if not bool(given[k].isfinite().all())],
    }
    words = [f"{len(keys)} {what} ({first_few(keys)})" for what, keys in problems.items() if keys]
    if words:
        raise CheckpointError(f"{path} ({found.layout}) does not fit {arch}: {'; '.join(words)}")
    net.load_state_dict({**{k: own[k] for k in counters}, **{k: given[k] for k in shared}})
    return LoadReport(tuple(shared), ignored, tuple(counters), sha256_file(path), found.layout)


def _sorted_header(data: bytes) -> bytes:
    """Sort the keys of a safetensors header: the library writes metadata in random order.

    Format: length of the header (8 bytes, little-endian), JSON padded with spaces, the tensors.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]
