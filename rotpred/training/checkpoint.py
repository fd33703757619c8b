"""Training state that survives being killed at any moment.

A file is written under a temporary name, read back, renamed; whatever is read has been checked
first, and nothing is ever unpickled beyond tensors and plain types (`weights_only=True`).
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

__all__ = ["Checkpoint", "CheckpointError", "load", "load_latest", "save", "sidecar_of"]

log = logging.getLogger(__name__)

PLAIN = (type(None), bool, int, float, str, bytes)


class Checkpoint(NamedTuple):
    """A verified training state."""

    step: int
    state: dict[str, Any]
    path: Path
    sha256: str


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int = 3) -> Path:
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
            to be damaged. The one that `rate` gave the highest score stays as well.

    Raises:
        CheckpointError: something that could not be loaded again, no space, or a disk that does not
            give back what was written. Older checkpoints are untouched then.
    """
    if keep < 2:
        raise ValueError(f"keep must be at least 2, got {keep}")
    size = _check_plain(state, "state")
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    path = folder / f"step_{step:07d}.pt"
    check_space(folder, size)
    temporary, digest = write_verified(path, lambda file: torch.save(state, file))
    previous = None
    if path.exists():
        try:
            previous = _verify(path)
        except CheckpointError as error:
            log.warning("replacing a damaged checkpoint: %s", error)
    # The sidecar first: a checkpoint is never without one. Where this step is written again, the
    # sidecar vouches for the old content too, until that has been replaced.
    record = {"step": step, "score": None, "sha256": digest, "previous": previous}
    _write_json(sidecar_of(path), record)
    replace(temporary, path)
    _rotate(folder, keep=keep, newest=step)
    return path


def rate(folder: Path, step: int, score: float, *, keep: int = 3) -> None:
    """Note the score of a saved checkpoint in its sidecar, then remove older ones as `save` does.

    Args:
        folder: where it lies.
        step: the newest one.
        score: higher is better.
        keep: as in `save`.

    Raises:
        CheckpointError: there is no such checkpoint, or its sidecar cannot be written.
    """
    if not math.isfinite(score):
        raise ValueError(f"score must be finite, got {score}")
    path = folder / f"step_{step:07d}.pt"
    _write_json(sidecar_of(path), {**_record(path), "score": score})
    _rotate(folder, keep=keep, newest=step)


def load(path: Path, *, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Read one training state after comparing it with its sidecar.

    Raises:
        CheckpointError: no sidecar, other bytes than were written, or not a plain state.
    """
    match = re.fullmatch(r"step_(\d+)\.pt", path.name)
    if match is None:
        raise CheckpointError(f"{path} is not called step_N.pt")
    digest = _verify(path)
    return Checkpoint(int(match[1]), load_plain(path, map_location), path, digest)


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


def _verify(path: Path) -> str:
    """Return the digest of a checkpoint that its sidecar vouches for."""
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
    """Return the name of the file that vouches for a checkpoint."""
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
            sidecar_of(path).unlink(missing_ok=True)


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


def _write_json(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record) + "\n"
    temporary, _ = write_verified(path, lambda file: file.write(text.encode()))
    replace(temporary, path)
