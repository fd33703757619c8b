"""Weights: ours written, ours and other projects' loaded, only where they fit completely."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torchvision
from torch import nn

from rotpred.files import CheckpointError, check_space, replace, sha256_file, write_verified
from rotpred.models.backbone import build_backbone
from rotpred.models.base import Backbone
from rotpred.models.heads import RotNet
from rotpred.weights.layouts import StateDictFile, Tensors, read, some

__all__ = [
    "LoadReport",
    "finite_tensors",
    "imagenet_file",
    "load_backbone",
    "load_rotnet",
    "read_backbone",
    "save_backbone",
    "sha256_file",
    "write_whole",
]

logger = logging.getLogger(__name__)

SUPERVISED = ("resnet18", "resnet50")
"""Backbones that torchvision has weights for, trained on ImageNet with its labels."""

_PATIENCE = 60.0


class LoadReport(NamedTuple):
    """What was loaded, by keys of the network (loaded, missing) or of the file (ignored)."""

    loaded: tuple[str, ...]
    ignored: tuple[str, ...]
    """Heads, and what else the layout is known to have beside a backbone."""
    missing: tuple[str, ...]
    """BN step counters that older files lack; nothing computes with them. Else empty."""
    sha256: str
    """Of the file, for the results' provenance."""
    layout: str
    """Whose format it was recognised as."""

    def words(self) -> str:
        """One line for the log."""
        parts = {"ignored": self.ignored, "missing": self.missing}
        more = [f"{len(k)} {what}" + (f" ({some(k)})" if k else "") for what, k in parts.items()]
        return f"{self.layout}: {len(self.loaded)} tensors loaded, {', '.join(more)}"


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
    tensors = finite_tensors(backbone)
    data = _sorted_header(safetensors.torch.save(tensors, {**meta, "arch": backbone.arch}))
    return write_whole(path, data)


def finite_tensors(backbone: Backbone) -> Tensors:
    """The state dict, on the CPU and contiguous, for a file.

    Raises:
        CheckpointError: values that are not finite.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
    sick = [key for key, value in tensors.items() if not bool(value.isfinite().all())]
    if sick:
        raise CheckpointError(f"not written, because of values that are not finite: {some(sick)}")
    return tensors


def write_whole(path: Path, data: bytes) -> str:
    """Write a file (and its folder) as a whole or not at all; return its SHA-256.

    Raises:
        CheckpointError: no space, or the disk does not give back what was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    check_space(path.parent, len(data))
    temporary, digest = write_verified(path, lambda file: file.write(data))
    replace(temporary, path)
    return digest


def load_backbone(backbone: Backbone, path: Path) -> LoadReport:
    """Fill a backbone from a file of any layout that `foreign.read` knows, whole or not at all.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged or unsafe file, another architecture, missing or unknown keys,
            other shapes, values that are not finite. The backbone is unchanged then.
    """
    return _fill_backbone(backbone, path, read(path))


def read_backbone(path: Path, arch: str | None = None) -> tuple[Backbone, LoadReport]:
    """Build the backbone that a file holds, and fill it.

    Args:
        path: as for `load_backbone`.
        arch: one of `BACKBONES`; None: the file is one of ours and names it.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: as `load_backbone`, or nothing names the architecture.
    """
    found = read(path)
    if arch is None and found.arch is None:
        raise CheckpointError(f"{path} does not say which network it is for: name its arch")
    backbone = build_backbone(arch or str(found.arch))
    return backbone, _fill_backbone(backbone, path, found)


def imagenet_file(arch: str) -> Path:
    """The file of torchvision's supervised weights (IMAGENET1K_V1), downloaded if it is not there.

    It lies where torchvision itself keeps it (torch.hub, TORCH_HOME); its name holds the start of
    its checksum, which is compared when it comes and when it is found.

    Raises:
        ValueError: torchvision has none for this network, or they cannot be had, in words.
        CheckpointError: the file is not what its name says.
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
        socket.setdefaulttimeout(_PATIENCE)  # torch's download has no timeout of its own
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=start, progress=False)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"no supervised weights ({error}): put {url} to {path}, or give --weights FILE or "
                "--weights random"
            ) from error
        finally:
            socket.setdefaulttimeout(before)
    if not sha256_file(path).startswith(start):
        raise CheckpointError(f"{path} is damaged: remove it, and it will be downloaded anew")
    return path


def load_rotnet(net: RotNet, path: Path, *, clockwise: bool | None = None) -> LoadReport:
    """Fill a backbone and its rotation head, to score or to go on with the pretext task.

    Heads that count quarter turns clockwise get their classes 1 and 3 swapped: ours count
    counter-clockwise, as do the authors', VISSL's and those of mmselfsup 0.x. mmselfsup 1.x counts
    clockwise (its processing.py turns with mmcv's `imrotate`).

    Args:
        net: one of `make_rotnet`.
        path: our training checkpoint, or a whole file of mmselfsup, VISSL or the authors.
        clockwise: how the file's head counts; needed where the file does not show it (mmselfsup's
            without `meta`), and compared where it does.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: as `load_backbone`, no rotation head, or its direction is unknown or
            another one. The network is unchanged then.
    """
    found = read(path)
    if not found.head:
        raise CheckpointError(f"{path} ({found.layout}) holds no rotation head")
    if found.clockwise is None and clockwise is None:
        raise CheckpointError(
            f"{path} ({found.layout}) does not show which way its labels turn: say whether "
            "clockwise (mmselfsup 1.x) or not (0.x)"
        )
    if None not in (found.clockwise, clockwise) and found.clockwise != clockwise:
        raise CheckpointError(
            f"{path} ({found.layout}) turns {'' if found.clockwise else 'counter-'}clockwise"
        )
    head = dict(found.head)
    if found.clockwise or clockwise:
        for key in ("fc.weight", "fc.bias"):
            if key in head:
                head[key] = _reverse(path, head[key])
    given = {f"backbone.{k}": v for k, v in found.backbone.items()}
    given |= {f"head.{k}": v for k, v in head.items()}
    return _fill(net, net.backbone.arch, path, found, given, found.ignored)


def _reverse(path: Path, classes: torch.Tensor) -> torch.Tensor:
    """Swap the rows of 90 and 270 degrees."""
    if classes.shape[:1] != (4,):
        raise CheckpointError(
            f"{path}: expected 4 rotations in the head, found {classes.shape[:1]}"
        )
    return classes[[0, 3, 2, 1]]


def _fill_backbone(backbone: Backbone, path: Path, found: StateDictFile) -> LoadReport:
    ignored = found.head_keys + found.ignored
    return _fill(backbone, backbone.arch, path, found, found.backbone, ignored)


def _fill(
    net: nn.Module,
    arch: str,
    path: Path,
    found: StateDictFile,
    given: Tensors,
    ignored: tuple[str, ...],
) -> LoadReport:
    """Load `given` into a network if nothing is wrong with any of it."""
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
    words = [f"{len(keys)} {what} ({some(keys)})" for what, keys in problems.items() if keys]
    if words:
        raise CheckpointError(f"{path} ({found.layout}) does not fit {arch}: {'; '.join(words)}")
    net.load_state_dict({**{k: own[k] for k in counters}, **{k: given[k] for k in shared}})
    return LoadReport(tuple(shared), ignored, tuple(counters), sha256_file(path), found.layout)


def _sorted_header(data: bytes) -> bytes:
    """Put the header of safetensors in order: the library writes metadata in a random one.

    Layout: length of the header (8 bytes, little-endian), JSON padded with spaces, the tensors.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]
