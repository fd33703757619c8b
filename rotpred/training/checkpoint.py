"""Checkpoints of the training state that survive a kill at any moment.

A file is written under a temporary name, read back and renamed. Its digest is checked before it is
loaded, and only tensors and plain types are unpickled (`weights_only=True`).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rotpred.files import (
    CheckpointError,
    check_space,
    load_plain,
    replace,
    sha256_file,
    write_verified,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "load",
    "load_latest",
    "save",
    "set_score",
    "sidecar_of",
]

log = logging.getLogger(__name__)

PLAIN = (type(None), bool, int, float, str, bytes)


class Checkpoint(NamedTuple):
    """A training state whose digest has been verified."""

    step: int
    state: dict[str, Any]
    path: Path
    sha256: str


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int = 3) -> Path:
    """Write `step_0000123.pt` and its sidecar `step_0000123.json`, then remove older ones.

    A kill at any moment leaves earlier checkpoints loadable. Only one process (rank 0) may save
    into a folder: temporary files of any other process are removed.

    Args:
        folder: Created if missing.
        step: Number of optimiser steps done.
        state: Tensors and plain types, nested in dicts with str or int keys, lists and tuples.
            `load_backbone` expects the network's state dict under "model" and the backbone's name
            under "arch".
        keep: How many of the latest valid checkpoints to keep, at least 2, since the last one may
            be damaged. The one with the highest score (`set_score`) is kept as well.

    Returns:
        The path of the checkpoint.

    Raises:
        ValueError: `keep` is less than 2.
        CheckpointError: The state holds something that cannot be loaded again, the disk is full, or
            the file differs when read back. Older checkpoints are unchanged.
    """
    if keep < 2:
        raise ValueError(f"keep must be at least 2, got {keep}")
    size = _check_plain(state, "state")
    folder.mkdir(parents=True, exist_ok=True)
    _remove_strays(folder)
    path = folder / f"step_{step:07d}.pt"
    check_space(folder, size)
    temporary, digest = write_verified(path, lambda file: torch.save(state, file))
    previous = None
    if path.exists():
        try:
            previous = _verify(path)
        except CheckpointError as error:
            log.warning("replacing a damaged checkpoint: %s", error)
    # The sidecar first: a checkpoint is never without one. If this step is written again, the
    # sidecar holds the digest of the old file too, until that has been replaced.
    record = {"step": step, "score": None, "sha256": digest, "previous": previous}
    _write_json(sidecar_of(path), record)
    replace(temporary, path)
    _remove_old(folder, keep=keep, newest=step)
    return path


def set_score(folder: Path, step: int, score: float, *, keep: int = 3) -> None:
    """Store the score of a checkpoint in its sidecar, then remove older ones as `save` does.

    Args:
        folder: The folder of the checkpoints.
        step: Step of the checkpoint, the newest one.
        score: Higher is better.
        keep: As in `save`.

    Raises:
        ValueError: The score is not finite.
        CheckpointError: There is no such checkpoint, or its sidecar cannot be written.
    """
    if not math.isfinite(score):
        raise ValueError(f"score must be finite, got {score}")
    path = folder / f"step_{step:07d}.pt"
    _write_json(sidecar_of(path), {**_record(path), "score": score})
    _remove_old(folder, keep=keep, newest=step)


def load(path: Path, *, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Read one training state after checking its digest against the sidecar.

    Args:
        path: The checkpoint, named step_N.pt.
        map_location: Device of the tensors.

    Raises:
        CheckpointError: The sidecar is missing, the digest differs, or the file holds more than
            tensors and plain types.
    """
    match = re.fullmatch(r"step_(\d+)\.pt", path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named step_N.pt")
    digest = _verify(path)
    return Checkpoint(int(match[1]), load_plain(path, map_location), path, digest)


def load_latest(folder: Path, *, map_location: str | torch.device = "cpu") -> Checkpoint | None:
    """Read the newest valid checkpoint; None if the folder has no checkpoints.

    Damaged ones are skipped with a warning each. This only reads, so all ranks may call it at once.
    If the folder may differ between machines, let rank 0 choose and broadcast the path.

    Raises:
        CheckpointError: There are checkpoints, but all of them are damaged.
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
            f"over): {'; '.join(reasons)}"
        )
    return None


def _verify(path: Path) -> str:
    """Return the digest of a checkpoint after comparing it with the sidecar."""
    record = _record(path)
    digest = sha256_file(path)
    if digest not in (record["sha256"], record.get("previous")):
        raise CheckpointError(f"{path} has changed since it was written (SHA-256 differs)")
    return digest


def _record(path: Path) -> dict[str, Any]:
    sidecar = sidecar_of(path)
    try:
        record = json.loads(sidecar.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be verified, {sidecar.name}: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("sha256"), str):
        raise CheckpointError(f"{path} cannot be verified, {sidecar.name} has no sha256")
    return record


def sidecar_of(path: Path) -> Path:
    """Return the path of the JSON file with a checkpoint's digest and score."""
    return path.with_suffix(".json")


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of all checkpoints, highest step first; names and times do not count."""
    if not folder.is_dir():
        return []
    found = [(re.fullmatch(r"step_(\d+)\.pt", path.name), path) for path in folder.iterdir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _remove_old(folder: Path, *, keep: int, newest: int) -> None:
    """Remove checkpoints older than the `keep` latest valid ones, except the best one.

    Steps beyond `newest` belong to an abandoned run: they are neither counted nor removed.
    """
    candidates = [(step, path) for step, path in _steps(folder) if step <= newest]
    best: tuple[float, int] | None = None
    valid: set[int] = set()
    for step, path in candidates:
        try:
            score = _record(path).get("score")
            if score is not None:
                best = max(best or (score, step), (score, step))
            # A damaged file must not displace one that can be loaded.
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
            sidecar_of(path).unlink(missing_ok=True)


def _remove_strays(folder: Path) -> None:
    """Remove what a killed process left: temporary files, and sidecars without a checkpoint."""
    for stray in folder.glob(".*.tmp"):
        stray.unlink(missing_ok=True)
    for sidecar in folder.glob("step_*.json"):
        if not sidecar.with_suffix(".pt").exists():
            sidecar.unlink(missing_ok=True)


def _check_plain(value: object, where: str) -> int:
    """Return the bytes of all tensors in a state, after checking that weights_only can load it.

    Types are compared exactly: numpy.float64 is a subclass of float, but does not load.

    Raises:
        CheckpointError: A value or key has a type that cannot be loaded.
    """
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if type(value) in PLAIN:
        return 0
    if type(value) in (dict, OrderedDict):
        assert isinstance(value, dict)
        bad_keys = [key for key in value if type(key) not in (str, int)]
        if bad_keys:
            raise CheckpointError(
                f"{where} has the key {bad_keys[0]!r}: only str and int can be saved"
            )
        return sum(_check_plain(item, f"{where}[{key!r}]") for key, item in value.items())
    if type(value) in (list, tuple):
        assert isinstance(value, list | tuple)
        return sum(_check_plain(item, f"{where}[{k}]") for k, item in enumerate(value))
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}: only tensors, numbers, "
        "strings, lists, tuples and dicts can be saved"
    )


def _write_json(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record) + "\n"
    temporary, _ = write_verified(path, lambda file: file.write(text.encode()))
    replace(temporary, path)
