"""Checkpoints of the training state that survive a kill at any moment.

A file is written under a temporary name, read back and renamed. Its digest is checked before it is
loaded, and only tensors and plain types are unpickled (`weights_only=True`).
"""

from __future__ import annotations

import logging
import math
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipelines.storage import (
    read_json,
    remove_leftovers,
    replaced,
    sha256_file,
    write_json,
    write_verified,
)

log = logging.getLogger(__name__)

PLAIN = (type(None), bool, int, float, str, bytes)


class CheckpointError(ValueError):
    """A checkpoint cannot be written or cannot be used. The message says why."""


class Checkpoint(NamedTuple):
    """A training state whose digest has been verified."""

    step: int
    state: dict[str, Any]
    path: Path


class CheckpointFolder:
    """The checkpoints of one run: `step_0000123.pt`, each with a sidecar `step_0000123.json`.

    A kill at any moment leaves earlier checkpoints loadable. Only one process (rank 0) may write:
    temporary files of any other process are removed. Any process may read.
    """

    def __init__(self, path: Path, *, keep: int = 3) -> None:
        """Remember the folder; `save` creates it.

        Args:
            path: The folder.
            keep: How many of the latest valid checkpoints to keep, at least 2, since the last one
                may be damaged. The one with the highest score is kept as well.

        Raises:
            ValueError: `keep` is less than 2.
        """
        if keep < 2:
            raise ValueError(f"keep must be at least 2, got {keep}")
        self.path = path
        self._keep = keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint and its sidecar, then remove older ones.

        Args:
            step: Number of optimiser steps done.
            state: Tensors and plain types, nested in dicts with str or int keys, lists and tuples.
                `load_backbone` expects the network's state dict under "model" and the backbone's
                name under "arch".

        Returns:
            The path of the checkpoint.

        Raises:
            CheckpointError: The state holds something that cannot be loaded again, the disk is
                full, or the file differs when read back. Older checkpoints are unchanged.
        """
        size = _check_plain(state, "state")
        path = self._path_of(step)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._remove_strays()
            with replaced(path, size=size) as temporary:
                digest = write_verified(temporary, lambda file: torch.save(state, file))
                # The sidecar first: a checkpoint is never without one. If this step is written
                # again, the sidecar holds the digest of the old file too, until it is replaced.
                previous = _sha256_if_intact(path) if path.exists() else None
                record = {"step": step, "score": None, "sha256": digest, "previous": previous}
                write_json(sidecar_of(path), record, indent=None)
        # torch turns a full disk into a RuntimeError
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"cannot write {path}: {error}") from error
        self._remove_old(newest=step)
        return path

    def set_score(self, step: int, score: float) -> None:
        """Store the score of the newest checkpoint in its sidecar, then remove older ones.

        Args:
            step: Step of the checkpoint.
            score: Higher is better.

        Raises:
            ValueError: The score is not finite.
            CheckpointError: There is no such checkpoint, or its sidecar cannot be written.
        """
        if not math.isfinite(score):
            raise ValueError(f"score must be finite, got {score}")
        path = self._path_of(step)
        record = {**_record(path), "score": score}
        try:
            write_json(sidecar_of(path), record, indent=None)
        except OSError as error:
            raise CheckpointError(f"cannot write {sidecar_of(path)}: {error}") from error
        self._remove_old(newest=step)

    def latest(self) -> Checkpoint | None:
        """Read the newest valid checkpoint, on the CPU; None if the folder has no checkpoints.

        Damaged ones are skipped with a warning each. If the folder may differ between machines,
        let rank 0 choose and broadcast the path for `load`.

        Raises:
            CheckpointError: There are checkpoints, but all of them are damaged.
        """
        reasons = []
        for step, path in self._steps():
            try:
                checkpoint = load(path)
            except CheckpointError as error:
                log.warning("skipping the checkpoint of step %d: %s", step, error)
                reasons.append(str(error))
                continue
            if reasons:
                log.warning("going back to the checkpoint of step %d: %s", step, path)
            return checkpoint
        if reasons:
            raise CheckpointError(
                f"none of the {len(reasons)} checkpoints in {self.path} can be used (remove them "
                f"to start over): {'; '.join(reasons)}"
            )
        return None

    def _path_of(self, step: int) -> Path:
        return self.path / f"step_{step:07d}.pt"

    def _steps(self) -> list[tuple[int, Path]]:
        """Return (step, path), highest step first; neither names nor times are compared."""
        found = [(re.fullmatch(r"step_(\d+)\.pt", p.name), p) for p in self.path.glob("*.pt")]
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)

    def _remove_old(self, *, newest: int) -> None:
        """Remove checkpoints older than the `keep` latest valid ones, except the best one.

        Steps beyond `newest` belong to an abandoned run: they are neither counted nor removed.
        """
        candidates = [(step, path) for step, path in self._steps() if step <= newest]
        valid: list[int] = []
        scores: list[tuple[float, int]] = []
        for step, path in candidates:
            try:
                score = _record(path).get("score")
                if score is not None:
                    scores.append((score, step))
                # A damaged file must not displace one that can be loaded.
                if len(valid) < self._keep and (step == newest or _verify(path)):
                    valid.append(step)
            except CheckpointError as error:
                log.warning("damaged checkpoint: %s", error)
        _, best = max(scores, default=(None, None))
        for step, path in candidates:
            if len(valid) == self._keep and step < valid[-1] and step != best:
                path.unlink(missing_ok=True)
                sidecar_of(path).unlink(missing_ok=True)

    def _remove_strays(self) -> None:
        """Remove what a killed process left: temporary files, sidecars without a checkpoint."""
        remove_leftovers(self.path)
        for sidecar in self.path.glob("step_*.json"):
            if not sidecar.with_suffix(".pt").exists():
                sidecar.unlink(missing_ok=True)


def load(path: Path) -> Checkpoint:
    """Read one training state, on the CPU, after checking its digest against the sidecar.

    Args:
        path: The checkpoint, beside its sidecar.

    Raises:
        CheckpointError: The sidecar is missing, the digest differs, or the file holds more than
            tensors and plain types.
    """
    return Checkpoint(_verify(path)["step"], load_plain(path), path)


def load_plain(path: Path) -> dict[str, Any]:
    """Read a dict of tensors and plain types, on the CPU, without running code from the file.

    Raises:
        CheckpointError: The file is damaged or holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # Damaged bytes may raise any exception; all of them mean a damaged file.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors and plain types: {reason}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict")
    return content


def sidecar_of(path: Path) -> Path:
    """Return the path of the JSON file with a checkpoint's digest and score."""
    return path.with_suffix(".json")


def _record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = read_json(sidecar_of(path), dict)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be verified: {error}") from error
    if not (isinstance(record.get("sha256"), str) and isinstance(record.get("step"), int)):
        raise CheckpointError(f"{path} cannot be verified: no sha256 or step in {sidecar_of(path)}")
    return record


def _verify(path: Path) -> dict[str, Any]:
    """Return the record of a checkpoint after comparing the digests, with that of the file."""
    record = _record(path)
    digest = sha256_file(path)
    if digest not in (record["sha256"], record.get("previous")):
        raise CheckpointError(f"{path} has changed since it was written (SHA-256 differs)")
    return {**record, "sha256": digest}


def _sha256_if_intact(path: Path) -> str | None:
    """Return the digest of a checkpoint that is about to be replaced; None if it is damaged."""
    try:
        return str(_verify(path)["sha256"])
    except CheckpointError as error:
        log.warning("replacing a damaged checkpoint: %s", error)
        return None


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
