"""Training state that survives being killed, and backbone weights that are refused unless they fit.

A file is written under a temporary name, read back, renamed; whatever is read has been checked
first, and nothing is ever unpickled beyond tensors and plain types (`weights_only=True`).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import safetensors
import safetensors.torch
import torch

from rotpred.backbone import Backbone

log = logging.getLogger(__name__)

PLAIN = (type(None), bool, int, float, str, bytes)
KNOWN_HEADS = ("head.", "fc.")
"""Prefixes of keys that a backbone does without: our own and mmselfsup's heads, torchvision's."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or one that was found cannot be used; says why."""


class Checkpoint(NamedTuple):
    """A verified training state."""

    step: int
    state: dict[str, Any]
    path: Path
    sha256: str


class LoadReport(NamedTuple):
    """What `load_backbone` did, by keys of the backbone (loaded, missing) or the file (ignored)."""

    loaded: tuple[str, ...]
    ignored: tuple[str, ...]
    """Keys of a known head."""
    missing: tuple[str, ...]
    """BN step counters that older files lack; nothing computes with them. Else empty."""
    sha256: str
    """Of the file, for the results' provenance."""


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(
    folder: Path, step: int, state: dict[str, Any], *, keep: int = 3, score: float | None = None
) -> Path:
    """Write `step_0000123.pt` and its sidecar `step_0000123.json`, then remove older ones.

    A process killed at any moment leaves what was loadable before loadable. Only one process may
    save into a folder (rank 0): temporary files of others are swept away as strays.

    Args:
        folder: made where it does not exist.
        step: optimiser steps done.
        state: tensors and plain types, nested in dicts with str or int keys, lists and tuples. The
            network's state dict goes by "model" and its backbone's name by "arch", so that
            `load_backbone` can read the file.
        keep: how many of the latest valid checkpoints stay, at least 2: the last one may turn out
            to be damaged.
        score: higher is better; the best one stays as well.

    Raises:
        CheckpointError: something that could not be loaded again, no space, or a disk that does not
            give back what was written. Older checkpoints are untouched then.
    """
    if keep < 2:
        raise ValueError(f"keep must be at least 2, got {keep}")
    if score is not None and not math.isfinite(score):
        raise ValueError(f"score must be finite, got {score}")
    size = _check_plain(state, "state")
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    path = folder / f"step_{step:07d}.pt"
    _check_space(folder, size)
    temporary, digest = _write(path, lambda file: torch.save(state, file))
    previous = None
    if path.exists():
        try:
            previous = _verify(path)
        except CheckpointError as error:
            log.warning("replacing a damaged checkpoint: %s", error)
    # The sidecar first: a checkpoint is never without one. Where this step is written again, the
    # sidecar vouches for the old content too, until that has been replaced.
    record = {"step": step, "score": score, "sha256": digest, "previous": previous}
    _write_json(_sidecar(path), record)
    _replace(temporary, path)
    _rotate(folder, keep=keep, newest=step)
    return path


def load(path: Path, *, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Read one training state after comparing it with its sidecar.

    Raises:
        CheckpointError: no sidecar, other bytes than were written, or not a plain state.
    """
    match = re.fullmatch(r"step_(\d+)\.pt", path.name)
    if match is None:
        raise CheckpointError(f"{path} is not called step_N.pt")
    digest = _verify(path)
    return Checkpoint(int(match[1]), _torch_load(path, map_location), path, digest)


def load_latest(folder: Path, *, map_location: str | torch.device = "cpu") -> Checkpoint | None:
    """Read the checkpoint of the highest step that is valid; None where there is none at all.

    Damaged ones are passed over with a warning each. Reads only, so that all ranks may call it at
    once; let rank 0 choose and broadcast the path where the folder may differ between machines.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    found = _steps(folder)
    reasons = []
    for step, path in found:
        try:
            checkpoint = load(path, map_location=map_location)
        except CheckpointError as error:
            log.warning("skipping the checkpoint of step %d: %s", step, error)
            reasons.append(str(error))
            continue
        if reasons:
            log.warning("going back to the checkpoint of step %d: %s", step, path)
        return checkpoint
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {folder} can be used (remove them to start "
            f"from the beginning): {'; '.join(reasons)}"
        )
    return None


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
    _check_space(path.parent, len(data))
    temporary, digest = _write(path, lambda file: file.write(data))
    _replace(temporary, path)
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
    content = load(path).state if _sidecar(path).exists() else _torch_load(path, "cpu")
    arch = content.get("arch")
    for container in ("model", "state_dict"):
        if isinstance(content.get(container), dict):
            content = content[container]
            break
    odd = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise CheckpointError(f"{path} is no state dict: {_some(odd)} are not tensors")
    return content, arch if isinstance(arch, str) else None


def _torch_load(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    # Damaged files raise whatever their bytes lead to; all of it means the same here.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors and plain types: {reason}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict")
    return content


def _verify(path: Path) -> str:
    """Return the digest of a checkpoint that its sidecar vouches for."""
    record = _record(path)
    digest = sha256_file(path)
    if digest not in (record["sha256"], record.get("previous")):
        raise CheckpointError(f"{path} has changed since it was written (SHA-256 differs)")
    return digest


def _record(path: Path) -> dict[str, Any]:
    sidecar = _sidecar(path)
    try:
        record = json.loads(sidecar.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be verified, {sidecar.name}: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("sha256"), str):
        raise CheckpointError(f"{path} cannot be verified, {sidecar.name} has no sha256")
    return record


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of all checkpoints, latest first, by number and not by name or time."""
    if not folder.is_dir():
        return []
    found = [(re.fullmatch(r"step_(\d+)\.pt", path.name), path) for path in folder.iterdir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _rotate(folder: Path, *, keep: int, newest: int) -> None:
    """Remove what is older than the `keep` latest valid checkpoints, except the best one.

    Steps beyond the newest come from a run that was abandoned: neither counted nor touched.
    """
    candidates = [(step, path) for step, path in _steps(folder) if step <= newest]
    best: tuple[float, int] | None = None
    valid: set[int] = set()
    for step, path in candidates:
        try:
            score = _record(path).get("score")
            if score is not None:
                best = max(best or (score, step), (score, step))
            # A damaged file must not take the place of one that can be loaded.
            if len(valid) < keep and (step == newest or _verify(path)):
                valid.add(step)
        except CheckpointError as error:
            log.warning("damaged checkpoint: %s", error)
    if len(valid) < keep:
        return
    oldest = min(valid)
    for step, path in candidates:
        if step < oldest and (best is None or step != best[1]):
            path.unlink(missing_ok=True)
            _sidecar(path).unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what a killed process left: temporary files, and sidecars without their file."""
    for stray in folder.glob(".*.tmp"):
        stray.unlink(missing_ok=True)
    for sidecar in folder.glob("step_*.json"):
        if not sidecar.with_suffix(".pt").exists():
            sidecar.unlink(missing_ok=True)


def _check_plain(value: object, where: str) -> int:
    """Return the bytes of all tensors in a state; refuse what weights_only would not load again.

    Types are compared exactly: numpy.float64 is a float by inheritance, and does not load.
    """
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if type(value) in PLAIN:
        return 0
    if type(value) in (dict, OrderedDict):
        assert isinstance(value, dict)
        odd = [key for key in value if type(key) not in (str, int)]
        if odd:
            raise CheckpointError(f"{where} has the key {odd[0]!r}: only str and int can be saved")
        return sum(_check_plain(item, f"{where}[{key!r}]") for key, item in value.items())
    if type(value) in (list, tuple):
        assert isinstance(value, list | tuple)
        return sum(_check_plain(item, f"{where}[{k}]") for k, item in enumerate(value))
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}: only tensors, numbers, "
        "strings, lists, tuples and dicts can be saved"
    )


def _check_space(folder: Path, size: int) -> None:
    needed = size + size // 50 + 2**20  # names, alignment and the archive's index
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"no space for a checkpoint in {folder}: needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} "
            "MB are free"
        )


class _HashingFile(io.FileIO):
    """A file that knows the digest of what it was told to write, whatever reaches the disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.digest = hashlib.sha256()

    def write(self, data: Any, /) -> int:  # raw files may write less than asked
        view = memoryview(data).cast("B")
        self.digest.update(view)
        done = 0
        while done < len(view):
            done += super().write(view[done:])
        return done


def _write(path: Path, fill: Callable[[IO[bytes]], object]) -> tuple[Path, str]:
    """Write a temporary file beside `path`, force it to the disk, and read it back."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _HashingFile(temporary) as file:
            fill(file)
            os.fsync(file.fileno())
        digest = file.digest.hexdigest()
        if sha256_file(temporary) != digest:
            raise CheckpointError(f"{temporary} reads back other bytes than were written")
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary, digest


def _replace(temporary: Path, path: Path) -> None:
    """Give a finished file its name, and make the name last."""
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_json(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record) + "\n"
    temporary, _ = _write(path, lambda file: file.write(text.encode()))
    _replace(temporary, path)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
