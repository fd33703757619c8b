"""Data sets that engines read: encoded images with labels, in files or in a beton."""

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
"""Value of `Beton.modes` for uncompressed pixels. Stock FFCV writes them, we do not."""

FINGERPRINT_FILES = 1024
"""Number of files whose size `fingerprint` reads: few enough for a network file system."""


def open_samples(data: str, root: str = "") -> Samples:
    """Open the data set of a spec: a .beton file, or image files (see `open_images`).

    Args:
        data: See `LoaderSpec.data`.
        root: See `LoaderSpec.root`.

    Raises:
        FileNotFoundError: The file or folder does not exist.
        ValueError: It is not a data set, or must be converted to a beton first.
    """
    if Path(data).suffix == ".beton":
        if root:
            raise ValueError(f"{data}: root is for list files, not for a beton")
        return Beton.open(Path(data))
    if data == "digits" or data.startswith("torchvision:"):
        raise ValueError(f"{data}: not stored as image files; convert it with scripts/to_beton.py")
    found = open_images(data, root=root or None)
    assert isinstance(found, SampleIndex)
    return found


def read_encoded(samples: Samples, i: int) -> bytes | npt.NDArray[np.uint8]:
    """Return the stored bytes of sample `i`; of a beton a view, uint8 (bytes,).

    Raises:
        ImageError: The file cannot be read. Callers treat it like an undecodable sample.
    """
    if isinstance(samples, Beton):
        return samples.payload(i)
    try:
        return samples.read(i)
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error


def sample_name(samples: Samples, i: int) -> str:
    """Return the name of sample `i` for messages: its file, or its index in the beton."""
    if isinstance(samples, Beton):
        return f"{samples.path}: sample {i}"
    return str(samples.path(i))


def close_samples(samples: Samples) -> None:
    """Close a beton and release its lock. Does nothing for image files."""
    if isinstance(samples, Beton):
        samples.close()


def fingerprint(samples: Samples) -> str:
    """Return a short hash that identifies the data set. For a beton, a hash of its tables.

    For image files, it covers paths, labels, and the sizes of up to `FINGERPRINT_FILES` evenly
    spaced files. So it detects that all files were replaced under the same names. It may miss a few
    replaced files among many, and misses a replacement of equal size. Modification times are not
    included: a copy on another machine has the same fingerprint.
    """
    if isinstance(samples, Beton):
        return samples.fingerprint
    digest = hashlib.sha256(samples.blob)
    digest.update(samples.labels.tobytes())
    count = min(len(samples), FINGERPRINT_FILES)
    sizes = [samples.size(k * len(samples) // count) for k in range(count)]
    digest.update(np.array(sizes, "<i8").tobytes())
    return digest.hexdigest()[:16]
