"""Manifest of a beton: a JSON file with class names, checksums and how the beton was made."""

from __future__ import annotations

import base64
import binascii
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

VERSION = 1
_MAX_BYTES = 1 << 30


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
    crc32: npt.NDArray[np.uint32]
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
        return json.dumps(
            {
                "format": "rotpred beton manifest",
                "version": VERSION,
                "samples": self.samples,
                "classes": list(self.classes),
                "fields": list(self.fields),
                "fingerprint": self.fingerprint,
                "sha256": self.sha256,
                "passed": self.passed,
                "reencoded": self.reencoded,
                "quarantined": self.quarantined,
                **({} if self.restarts is None else {"restarts": asdict(self.restarts)}),
                "options": self.options,
                "versions": self.versions,
                "source": self.source,
                "crc32": base64.b64encode(self.crc32.astype("<u4").tobytes()).decode(),
            },
            indent=1,
        )


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

    def get(key: str, kind: type) -> object:
        value = found.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{path}: key {key!r}: expected {kind.__name__}, found {value!r:.60}")
        return value

    def names(key: str) -> tuple[str, ...]:
        values = get(key, list)
        assert isinstance(values, list)
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{path}: key {key!r}: expected a list of strings")
        return tuple(values)

    def number(key: str) -> int:
        value = get(key, int)
        assert isinstance(value, int)
        return value

    def table(key: str) -> dict[str, object]:
        value = get(key, dict)
        assert isinstance(value, dict)
        return value

    def numbers(key: str, values: object) -> dict[str, int]:
        if not isinstance(values, dict):
            raise ValueError(f"{path}: key {key!r}: expected dict, found {values!r:.60}")
        for reason, count in values.items():
            if not isinstance(count, int):
                raise ValueError(f"{path}: key {key!r}: {reason!r} is not an integer")
        return values

    restarts = None
    if "restarts" in found:
        of = table("restarts")
        plain = numbers("restarts", {key: of.get(key) for key in ("cut", "added")})
        uncut = numbers("restarts", of.get("uncut"))
        restarts = RestartCounts(cut=plain["cut"], uncut=uncut, added=plain["added"])
    try:
        sums = np.frombuffer(base64.b64decode(str(get("crc32", str)), validate=True), "<u4")
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{path}: key 'crc32': {error}") from error
    if len(sums) != number("samples"):
        raise ValueError(
            f"{path}: key 'crc32': expected {number('samples')} checksums, found {len(sums)}"
        )
    return Manifest(
        samples=number("samples"),
        classes=names("classes"),
        fields=names("fields"),
        fingerprint=str(get("fingerprint", str)),
        sha256=str(get("sha256", str)),
        crc32=sums.astype(np.uint32),
        passed=number("passed"),
        reencoded=numbers("reencoded", table("reencoded")),
        quarantined=number("quarantined"),
        restarts=restarts,
        options=table("options"),
        versions={key: str(value) for key, value in table("versions").items()},
        source=table("source"),
    )
