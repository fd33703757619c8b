"""`Samples`: the one interface of data sets, which loaders and conversions read; and its opening.

`pipelines.datasets.index.SampleIndex` (image files), `pipelines.datasets.images.MemoryImages` and
`pipelines.beton.reader.Beton` implement it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pipelines.arrays import Int64, Uint8
from pipelines.beton.reader import Beton
from pipelines.datasets.images import open_images


class Samples(Protocol):
    """An ordered set of N images with labels."""

    @property
    def labels(self) -> Int64:
        """int64 (N,): class ids; -1 where there are no labels."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by id; empty if there are no labels, or if their names are unknown."""

    @property
    def fingerprint(self) -> str:
        """Short hash that identifies the data set. Computed at each call."""

    @property
    def beton(self) -> Beton | None:
        """The beton, for engines that read its tables and its bytes in place; None for others.

        An interface that names one implementation: two engines need the mapped file itself, and
        would else ask for its type.
        """

    def __len__(self) -> int:
        """Return N."""

    def read(self, i: int) -> bytes | Uint8:
        """Read sample `i`.

        Returns:
            The encoded image, as bytes or uint8 (bytes,); or its RGB pixels, uint8 (H, W, 3). An
            array may be a view of a mapped file.

        Raises:
            ImageError: The sample cannot be read.
            ValueError: The pixels have another type or shape.
        """

    def name(self, i: int) -> str:
        """Return the name of sample `i` for lists: no absolute path."""

    def location(self, i: int) -> str:
        """Return where sample `i` is stored, for messages."""

    def size(self, i: int) -> int:
        """Estimate the size of sample `i` in bytes, when it is encoded."""

    def describe(self) -> dict[str, object]:
        """Describe the data set for a manifest: JSON types, no absolute paths."""

    def close(self) -> None:
        """Release files and locks."""


def open_samples(data: str, root: str | None = None) -> Samples:
    """Open the data set of a spec: a .beton file, or image files (see `open_images`).

    Args:
        data: See `LoaderSpec.data`.
        root: See `LoaderSpec.root`.

    Raises:
        FileNotFoundError: The file or folder does not exist.
        ValueError: It is not a data set, or must be converted to a beton first.
    """
    if Path(data).suffix == ".beton":
        if root is not None:
            raise ValueError(f"{data}: root is for list files, not for a beton")
        return Beton.open(Path(data))
    if data == "digits" or data.startswith("torchvision:"):
        raise ValueError(f"{data}: not stored as image files; convert it with scripts/to_beton.py")
    return open_images(data, root=root)
