"""Conversion of an image data set to a beton: checked, deterministic, and all or nothing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import PIL
from PIL import features

from pipelines.beton.manifest import Manifest, RestartCounts, manifest_path
from pipelines.beton.reader import BetonError
from pipelines.beton.writer import FIELDS, BetonWriter, PageTooSmall, page_for
from pipelines.conversion.encode import PASSED, Check, Options
from pipelines.conversion.workers import RejectedFile, WorkerError, prepare_images
from pipelines.samples import Samples
from pipelines.storage import (
    LockedError,
    check_space,
    locked,
    remove_leftovers,
    replaced_together,
    write_atomic,
    write_verified,
)

Progress = Callable[[int, int], None]
"""Called with the number of samples done and the total."""

QUARANTINE, FAILED = ".quarantine.jsonl", ".failed.jsonl"
"""Suffixes of the lists of files that were left out, and that stopped a conversion."""

_PAGE = 1 << 23
_SMALL_BYTES = 1 << 26
_CHUNK_BYTES = 1 << 22
_PROBES = 512
_NAMED_BAD = 3


class ConversionError(ValueError):
    """The conversion stopped, and the output was not changed. The message gives the reason."""


def write_beton(
    source: Samples,
    output: str | os.PathLike[str],
    *,
    max_side: int | None = None,
    short_side: int | None = None,
    quality: int = 90,
    workers: int = 0,
    budget: int | None = None,
    check: Check = "scan",
    restart_markers: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Convert a data set to a beton and its manifest (`OUTPUT.json`).

    JPEG streams are stored unchanged if all decoders read them alike (see `prepare`). Files that
    are not images are left out and listed in `OUTPUT.quarantine.jsonl` with path, reason and size
    in bytes. The output does not depend on the number of workers. It appears after it has been
    read back and compared, or not at all.

    Args:
        source: The images, stored in this order.
        output: Path of the beton.
        max_side: Largest side in pixels. Larger images are shrunk.
        short_side: Largest short side in pixels. Larger images are shrunk. Excludes `max_side`.
        quality: JPEG quality of shrunk images.
        workers: Number of worker processes. 0: one per available core.
        budget: Unusable files to tolerate. None: 0.1 %, but at least ten. One more stops the
            conversion and lists them in `OUTPUT.failed.jsonl`.
        check: scan follows every Huffman code of a JPEG stream; header finds truncation only.
        restart_markers: Insert restart markers into baseline JPEG streams (see
            `pipelines.jpeg.restart_markers`) and write their positions to `OUTPUT.segments`.
            Loaders then decode only the part of an image that a crop needs.
        overwrite: Replace an existing file, after the new one is verified.
        progress: Called with the samples done and the total.

    Returns:
        The manifest.

    Raises:
        ConversionError: The output exists, the disk is full, a worker process died, or too many
            files are unusable.
        ValueError: An argument is out of range.
    """
    options = Options(
        max_side=max_side,
        short_side=short_side,
        quality=quality,
        check=check,
        restart_markers=restart_markers,
    )
    target = Path(output)
    if workers < 0 or (budget is not None and budget < 0):
        raise ValueError("workers and budget must not be negative")
    if not len(source):
        raise ConversionError("there are no samples to convert")
    if not target.parent.is_dir():
        raise ConversionError(f"{str(target.parent)!r} is not a folder")
    if target.exists() and not target.is_file():
        raise ConversionError(f"{str(target)!r} exists and is not a file")
    if target.exists() and not overwrite:
        raise ConversionError(f"{str(target)!r} exists; overwriting it was not requested")
    budget = max(10, len(source) // 1000) if budget is None else budget
    run = _Conversion(source, target, options, workers, budget, progress)
    try:
        with locked(target, hint="two conversions cannot write one file"):
            for suffix in (".json", QUARANTINE, FAILED):
                remove_leftovers(target.parent, f"{target.name}{suffix}")
            return run.convert()
    except (BetonError, LockedError, WorkerError) as error:
        raise ConversionError(str(error)) from error
    except OSError as error:
        raise ConversionError(f"{target}: {error.strerror or error}") from error


@dataclass
class _Conversion:
    """State of one conversion."""

    source: Samples
    target: Path
    options: Options
    workers: int
    budget: int
    progress: Progress | None
    kinds: Counter[str] = field(default_factory=Counter)
    uncut: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    added: int = 0
    rejected: list[RejectedFile] = field(default_factory=list)

    def convert(self) -> Manifest:
        """Convert the data set.

        The page size is estimated from a probe of the samples. If a sample turns out to be larger
        than a page, the conversion starts again with larger pages.
        """
        count = len(self.source)
        step = max(1, count // _PROBES)
        sizes = [self.source.size(i) for i in range(0, count, step)]
        total = int(sum(sizes) / len(sizes) * count)
        self._check_space(total)
        chunk = min(256, max(1, _CHUNK_BYTES * len(sizes) // max(1, sum(sizes))))
        page = page_for(max(sizes)) if total <= _SMALL_BYTES else page_for(max(sizes), least=_PAGE)
        while True:
            try:
                return self._attempt(page, chunk)
            except PageTooSmall as error:
                page = page_for(error.size)

    def _check_space(self, total: int) -> None:
        needed = int(1.1 * total) + 2 * _PAGE + 64 * len(self.source)
        try:
            check_space(self.target.parent, needed, what=self.target.name)
        except ValueError as error:
            raise ConversionError(str(error)) from error

    def _attempt(self, page: int, chunk: int) -> Manifest:
        self.kinds.clear()
        self.uncut.clear()
        self.rejected.clear()
        self.cut = self.added = 0
        markers = self.options.restart_markers
        count = len(self.source)
        with (
            # The beton is first: until the others follow, old ones remain, which name another.
            replaced_together(self.target, ("", ".segments", ".json", QUARANTINE, FAILED)) as path,
            BetonWriter(path, capacity=count, page_size=page, segments=markers) as writer,
        ):
            self._fill(writer, chunk)
            if not writer.count:
                raise ConversionError(f"no usable image among {count}{self._worst()}")
            beton, sha256 = writer.finish()
            with beton:
                manifest = Manifest(
                    samples=len(beton),
                    classes=tuple(self.source.classes),
                    fields=FIELDS,
                    fingerprint=beton.fingerprint,
                    sha256=sha256,
                    crc32=writer.sums.copy(),
                    passed=self.kinds.pop(PASSED, 0),
                    reencoded=dict(sorted(self.kinds.items())),
                    quarantined=len(self.rejected),
                    restarts=self._restarts(),
                    options={**asdict(self.options), "budget": self.budget, "page_size": page},
                    versions=_versions(),
                    source=self.source.describe(),
                )
            write_verified(manifest_path(path), manifest.dumps().encode())
            if self.rejected:
                write_verified(Path(f"{path}{QUARANTINE}"), self._list_rejected())
        return manifest

    def _fill(self, writer: BetonWriter, chunk: int) -> None:
        labels = np.asarray(self.source.labels)
        chunks = prepare_images(
            self.source, options=self.options, workers=self.workers, chunk=chunk
        )
        with contextlib.closing(chunks):  # Ends the worker processes, also after an error.
            for part in chunks:
                for i, result in enumerate(part.results, part.first):
                    if isinstance(result, RejectedFile):
                        self._reject(result)
                        continue
                    image, crc32 = result
                    self.kinds[image.kind] += 1
                    self.cut += image.cuts is not None
                    self.added += image.added
                    if image.uncut is not None:
                        self.uncut[image.uncut] += 1
                    writer.add(
                        image.data,
                        height=image.height,
                        width=image.width,
                        label=int(labels[i]),
                        crc32=crc32,
                        cuts=image.cuts,
                    )
                if self.progress is not None:
                    self.progress(part.first + len(part.results), len(self.source))

    def _restarts(self) -> RestartCounts | None:
        if not self.options.restart_markers:
            return None
        return RestartCounts(cut=self.cut, uncut=dict(sorted(self.uncut.items())), added=self.added)

    def _reject(self, file: RejectedFile) -> None:
        self.rejected.append(file)
        if len(self.rejected) > self.budget:
            write_atomic(Path(f"{self.target}{FAILED}"), self._list_rejected())
            raise ConversionError(
                f"stopped at {len(self.rejected)} unusable files, the budget is {self.budget} "
                f"(listed in {self.target}{FAILED}){self._worst()}"
            )

    def _worst(self) -> str:
        named = [f"{file.name!r}: {file.reason}" for file in self.rejected[:_NAMED_BAD]]
        return "".join(f"; {line}" for line in named)

    def _list_rejected(self) -> bytes:
        """Return the rejected files as JSON lines."""
        rows = ({"path": f.name, "reason": f.reason, "bytes": f.size} for f in self.rejected)
        return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _versions() -> dict[str, str]:
    try:
        ours = importlib.metadata.version("rotpred")
    except importlib.metadata.PackageNotFoundError:
        ours = "not installed"
    return {
        "rotpred": ours,
        "Pillow": PIL.__version__,
        "libjpeg": features.version("jpg") or "unknown",
        "numpy": np.__version__,
    }
