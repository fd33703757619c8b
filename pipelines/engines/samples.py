"""The data sets that engines read: encoded images with labels, from files or from a beton."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.beton.reader import Beton
from pipelines.datasets.images import open_images
from pipelines.datasets.index import SampleIndex
from pipelines.imaging.decode import ImageError

Samples = SampleIndex | Beton

RAW = 1
"""Value of `Beton.modes` for uncompressed pixels (stock FFCV writes them; we do not)."""

SIZED = 1024
"""Files that `fingerprint` asks for their size: few enough for a network's file system."""


def open_samples(data: str, root: str = "") -> Samples:
    """Open what `LoaderSpec.data` names: a .beton file, or what `open_images` finds in files.

    Args:
        data: as `LoaderSpec.data`.
        root: as `LoaderSpec.root`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is not a data set, or one that must be converted first, in words.
    """
    if Path(data).suffix == ".beton":
        if root:
            raise ValueError(f"{data}: a root goes with a list file, not with a beton")
        return Beton.open(Path(data))
    if data == "digits" or data.startswith("torchvision:"):
        raise ValueError(f"{data}: not in files of its own; convert it with scripts/to_beton.py")
    found = open_images(data, root=root or None)
    assert isinstance(found, SampleIndex)
    return found


def encoded(samples: Samples, i: int) -> bytes | npt.NDArray[np.uint8]:
    """The bytes of sample i as they are stored: from a beton a view, without a copy.

    Raises:
        ImageError: the file cannot be read; like one that cannot be decoded, it may be masked.
    """
    if isinstance(samples, Beton):
        return samples.payload(i)
    try:
        return samples.read(i)
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error


def name(samples: Samples, i: int) -> str:
    """How messages call sample i: its file, or its number in the beton."""
    if isinstance(samples, Beton):
        return f"{samples.path}: sample {i}"
    return str(samples.path(i))


def close(samples: Samples) -> None:
    """Release the file that a beton holds open and locked."""
    if isinstance(samples, Beton):
        samples.close()


def fingerprint(samples: Samples) -> str:
    """A short hash that identifies the data set: of a beton its tables.

    Of files it is paths, labels, and the sizes of up to `SIZED` files, evenly spaced. So other
    images under the same names are noticed, also where every file was made anew; a few replaced
    ones among many may not be, nor is one of the very same length. Times do not count: a copy on
    another machine is the same data set.
    """
    if isinstance(samples, Beton):
        return samples.fingerprint
    digest = hashlib.sha256(samples.blob)
    digest.update(samples.labels.tobytes())
    count = min(len(samples), SIZED)
    sizes = [samples.size(k * len(samples) // count) for k in range(count)]
    digest.update(np.array(sizes, "<i8").tobytes())
    return digest.hexdigest()[:16]
