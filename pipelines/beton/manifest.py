"""Manifest of a beton: a JSON file with class names, checksums and how the beton was made."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.arrays import Uint32

VERSION = 1
_MAX_BYTES = 1 << 30
_KINDS = {
    "samples": int, "classes": list, "fields": list, "fingerprint": str, "sha256": str,
    "crc32": str, "passed": int, "reencoded": dict, "quarantined": int, "options": dict,
    "versions": dict, "source": dict,
}  # fmt: skip


@dataclass(frozen=True)
class RestartCounts:
    """Counts of the restart markers added by a conversion."""

    cut: int
    """Samples that have restart markers."""
    uncut: dict[str, int]
    """Samples that cannot have them, by reason."""
    added: int
    """Bytes that the markers added."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """All that is known about a beton. Equal inputs and options give equal JSON."""

    samples: int
    """Samples in the file."""
    classes: tuple[str, ...]
    """Class names by id; empty without labels."""
    fields: tuple[str, ...]
    """Field names, in the order of the file."""
    fingerprint: str
    """`Beton.fingerprint` of the file."""
    sha256: str
    """SHA-256 of the whole file, for comparing copies. Not checked on reading."""
    crc32: Uint32
    """(N,): CRC-32 of each sample, computed when the sample was encoded."""
    passed: int = 0
    """JPEG files stored unchanged."""
    reencoded: dict[str, int] = field(default_factory=dict)
    """Images re-encoded, by reason."""
    quarantined: int = 0
    """Files left out because they are not usable images."""
    restarts: RestartCounts | None = None
    """Counts of restart markers; None if not requested, in which case there is no side file."""
    options: dict[str, object] = field(default_factory=dict)
    """Arguments of the conversion."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the software that made it."""
    source: dict[str, object] = field(default_factory=dict)
    """Description of the source, without absolute paths."""

    def dumps(self) -> str:
        """Return the manifest as JSON text."""
        values = {key: value for key, value in vars(self).items() if key != "crc32"}
        if self.restarts is None:
            del values["restarts"]
        else:
            values["restarts"] = asdict(self.restarts)
        sums = base64.b64encode(self.crc32.astype("<u4").tobytes()).decode()
        head = {"format": "rotpred beton manifest", "version": VERSION}
        return json.dumps({**head, **values, "crc32": sums}, indent=1)


def manifest_path(beton: str | os.PathLike[str]) -> Path:
    """Return the path of a beton's manifest: NAME.json."""
    return Path(f"{os.fspath(beton)}.json")


def load_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        ValueError: The manifest is invalid. The message is one line: file, key, expected, found.
        OSError: The file cannot be read.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path}: longer than {_MAX_BYTES} bytes")
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        version = found.get("version") if isinstance(found, dict) else None
        raise ValueError(f"{path}: key 'version': expected {VERSION}, found {version!r}")

    def check(fine: bool, key: str, expected: str) -> None:
        if not fine:
            place = f"{path}: key {key!r}: expected {expected}"
            raise ValueError(f"{place}, found {found.get(key)!r:.60}")

    def are_counts(values: object) -> bool:
        return isinstance(values, dict) and all(type(count) is int for count in values.values())

    for key, kind in _KINDS.items():
        check(type(found.get(key)) is kind, key, kind.__name__)
    for key in ("classes", "fields"):
        check(all(isinstance(name, str) for name in found[key]), key, "a list of strings")
    check(are_counts(found["reencoded"]), "reencoded", "an integer for each reason")
    restarts = None
    if "restarts" in found:
        counts = found["restarts"]
        fine = isinstance(counts, dict) and are_counts(counts.get("uncut"))
        fine = fine and type(counts.get("cut")) is type(counts.get("added")) is int
        check(fine, "restarts", "the integers cut and added, and one for each reason in uncut")
        restarts = RestartCounts(cut=counts["cut"], uncut=counts["uncut"], added=counts["added"])
    try:
        sums = np.frombuffer(base64.b64decode(found["crc32"], validate=True), "<u4")
    except ValueError as error:
        raise ValueError(f"{path}: key 'crc32': {error}") from error
    if len(sums) != found["samples"]:
        raise ValueError(
            f"{path}: key 'crc32': expected {found['samples']} checksums, found {len(sums)}"
        )
    values: dict[str, Any] = {key: found[key] for key in _KINDS}
    values["classes"], values["fields"] = tuple(found["classes"]), tuple(found["fields"])
    values["versions"] = {key: str(value) for key, value in found["versions"].items()}
    values["crc32"], values["restarts"] = sums.astype(np.uint32), restarts
    return Manifest(**values)
