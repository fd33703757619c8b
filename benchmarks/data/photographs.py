"""The benchmarks' images, from the user or generated, in every container that is compared."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness.results import log
from harness.runner import module_command, module_environment
from pipelines.beton.reader import Beton

CONVERTER = Path(__file__).resolve().parents[2] / "scripts" / "to_beton.py"
STOCK_WRITER = "data.stock_ffcv_beton"
SMALL_SIDE = 500
"""Longest side in pixels of the small copies: FFCV's own recipe for ImageNet."""
PHOTOGRAPHS = 512
"""Number generated if the user gives no images: an epoch of several batches."""
LIMIT_SECONDS = 1200


@dataclass(frozen=True)
class Containers:
    """The same images as files and in betons. Each container is made on first use."""

    source: Path
    """A folder of JPEG files, the originals."""
    folder: Path
    """Folder of the containers; existing ones are reused."""
    small_side: int = SMALL_SIDE
    workers: int = 0
    _made: dict[str, Path] = field(default_factory=dict)

    def original(self, *, markers: bool) -> Path:
        """Return a beton of the unchanged files."""
        name = "original-markers.beton" if markers else "original.beton"
        return self._once(name, lambda path: self._convert(path, markers=markers))

    def small(self, *, markers: bool) -> Path:
        """Return a beton of the images, shrunk if their longest side exceeds `small_side`."""
        name = f"small{self.small_side}{'-markers' if markers else ''}.beton"
        return self._once(
            name,
            lambda path: self._convert(path, "--max-side", str(self.small_side), markers=markers),
        )

    def small_folder(self) -> Path:
        """Return a folder with the samples of `small(markers=False)` as files of the same bytes."""
        return self._once(f"small{self.small_side}", self._unpack)

    def stock(self) -> Path:
        """Return a beton that FFCV's own writer made from the small files."""
        files = self.small_folder()

        def write(path: Path) -> None:
            _run(*module_command(STOCK_WRITER), str(files), str(path), str(self.small_side))

        return self._once(f"stock{self.small_side}.beton", write)

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        path = self.folder / name
        if name not in self._made and not path.exists():
            log(f"making {path}")
            self.folder.mkdir(parents=True, exist_ok=True)
            make(path)
        self._made[name] = path
        return path

    def _convert(self, path: Path, *options: str, markers: bool) -> None:
        more = [*options, "--restart-markers" if markers else "--no-restart-markers"]
        files = ["--input", str(self.source), "--output", str(path)]
        _run(sys.executable, str(CONVERTER), *files, "--workers", str(self.workers), *more)

    def _unpack(self, path: Path) -> None:
        partial = path.with_name(f"{path.name}.part")
        (partial / "all").mkdir(parents=True, exist_ok=True)
        with Beton.open(self.small(markers=False)) as beton:
            for i in range(len(beton)):
                (partial / "all" / f"{i:07}.jpg").write_bytes(beton.payload(i).tobytes())
        partial.rename(path)


def photographs(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Make JPEG files from scikit-learn's two photographs, cropped and enlarged to ImageNet sizes.

    Args:
        folder: Parent folder; an existing set of `count` files in it is reused.
        count: Number of files.
        seed: Decides sizes, positions and JPEG qualities.

    Returns:
        The folder of the files.
    """
    target = folder / f"photographs{count}"
    if target.exists():
        return target
    loaded: Any = importlib.import_module("sklearn.datasets").load_sample_images()
    sources = [Image.fromarray(pixels) for pixels in loaded.images]
    rng = np.random.default_rng(seed)
    partial = folder / f"{target.name}.part"
    for i in range(count):
        source = sources[i % len(sources)]
        width, height = (int(v) for v in rng.integers((320, 240), (641, 428)))
        left = int(rng.integers(0, source.width - width + 1))
        top = int(rng.integers(0, source.height - height + 1))
        # Most of ImageNet is about 500 x 375; some are larger.
        factor = float(np.exp(rng.normal(0.25, 0.25)))
        size = (round(width * factor), round(height * factor))
        region = source.crop((left, top, left + width, top + height)).resize(size)
        path = partial / "ab"[i % 2] / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        region.save(path, "JPEG", quality=int(rng.integers(85, 97)))
    partial.rename(target)
    return target


def containers(
    data: str | None, folder: Path, *, count: int, small_side: int = SMALL_SIDE
) -> Containers:
    """Return the containers of the user's folder, or of `count` generated photographs.

    Args:
        data: A folder of JPEG files; None generates photographs.
        folder: Parent folder of the containers.
        count: Number of photographs to generate.
        small_side: Longest side in pixels of the small copies.

    Raises:
        ValueError: `data` is not a folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if data is None:
        return Containers(photographs(folder, count), folder / f"made{count}", small_side)
    source = Path(data)
    if not source.is_dir():
        raise ValueError(f"{data} is not a folder of JPEG files")
    return Containers(source, folder / f"of-{source.resolve().name}", small_side)


def _run(*command: str) -> None:
    done = subprocess.run(
        command,
        env=module_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        program = next(word for word in command[1:] if not word.startswith("-"))
        raise ValueError(f"{Path(program).name}: {lines[-1]}")
