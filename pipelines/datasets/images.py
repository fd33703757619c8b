"""Opening of data sets that are not a beton: image files, or images in memory."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from pipelines.arrays import Int64, Uint8
from pipelines.checks import check
from pipelines.datasets.files import IndexFormatError
from pipelines.datasets.imagenet import imagenet_subset, imagenet_val
from pipelines.datasets.inaturalist import inaturalist
from pipelines.datasets.index import SampleIndex
from pipelines.datasets.voc_classification import voc2007
from pipelines.imaging.decode import ImageError, describe_error

Split = Literal["train", "val"]

# Data set: name of the argument that selects the split, its values for train and val.
_TORCHVISION: dict[str, tuple[str, object, object]] = {
    "CIFAR10": ("train", True, False),
    "CIFAR100": ("train", True, False),
    "MNIST": ("train", True, False),
    "FashionMNIST": ("train", True, False),
    "SVHN": ("split", "train", "test"),
    "STL10": ("split", "train", "test"),
}
# Layouts that need a root. KIND: function of (NAME, root), for data named KIND:NAME.
_LAYOUTS: dict[str, Callable[[str, str | os.PathLike[str]], SampleIndex]] = {
    "imagenet-val": lambda truth, root: imagenet_val(root, truth=truth),
    "imagenet-subset": lambda names, root: imagenet_subset(names, SampleIndex.from_folder(root)),
    "inaturalist": lambda annotations, root: inaturalist(annotations, root=root),
    "voc2007": lambda split, root: voc2007(root, split=split).images,
}
_DIGITS_SIDE = 32
_DIGITS_VAL_EVERY = 5


@dataclass(frozen=True, eq=False)
class MemoryImages:
    """Images returned by a function: from arrays, or from a data set of another library.

    A `pipelines.samples.Samples`.
    """

    get: Callable[[int], bytes | Uint8 | Image.Image]
    """Returns sample i: encoded, as uint8 (H, W, 3) or (H, W), or as a Pillow image."""
    labels: Int64
    """int64 (N,): class ids; -1 where there are no labels."""
    classes: tuple[str, ...]
    """Class names by id; empty if there are no labels."""
    about: dict[str, object] = field(default_factory=dict)
    """What `describe` returns, besides the number of samples."""
    beton: ClassVar[None] = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """Short hash of class names, labels, and images with their sizes. Reads every image."""
        digest = hashlib.sha256(str((len(self), self.classes)).encode() + self.labels.tobytes())
        for i in range(len(self)):
            image = self.read(i)
            size = len(image) if isinstance(image, bytes) else image.shape
            digest.update(f"{size};".encode() + bytes(image))
        return digest.hexdigest()[:16]

    def read(self, i: int) -> bytes | Uint8:
        """Read sample `i`: the encoded image, or uint8 (H, W, 3).

        Raises:
            ImageError: The other library cannot read its file, or Pillow cannot decode it.
            ValueError: The pixels have another type or shape.
        """
        try:
            image = self.get(i)
            if isinstance(image, Image.Image):  # Pillow may read the file only now.
                return np.asarray(image.convert("RGB"))
        except OSError as error:
            raise ImageError(describe_error(error)) from error
        if isinstance(image, bytes):
            return image
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise ValueError(f"pixels are {image.dtype} {image.shape}, not uint8 (H, W, 3)")
        if image.ndim == 2:
            return np.repeat(image[:, :, None], 3, axis=2)
        if image.shape[2] != 3:
            raise ValueError(f"pixels are {image.shape}, not (H, W, 3)")
        return image

    def name(self, i: int) -> str:
        """Return the number of sample `i`, as `#i`."""
        return f"#{i}"

    location = name

    def size(self, i: int) -> int:
        """Estimate the encoded size: half of the pixels' bytes; JPEG rarely needs more."""
        try:
            image = self.read(i)
        except ValueError:
            return 0  # The conversion reports the error; this is only an estimate.
        return len(image) if isinstance(image, bytes) else image.nbytes // 2 + 1024

    def describe(self) -> dict[str, object]:
        """Describe the images in JSON types."""
        return {"kind": "memory", **self.about, "samples": len(self)}

    def close(self) -> None:
        """Do nothing: no file stays open."""


def from_torchvision(
    name: str, *, root: str | os.PathLike[str], split: Split = "train", download: bool = False
) -> MemoryImages:
    """Open one of torchvision's small classification data sets.

    Args:
        name: CIFAR10, CIFAR100, MNIST, FashionMNIST, SVHN or STL10.
        root: Folder of torchvision's data.
        split: val is the test part of the data set.
        download: Whether to download the data set if it is missing.

    Raises:
        ValueError: The name is not one of these.
        FileNotFoundError: The data set is not in `root`, or cannot be downloaded.
    """
    if name not in _TORCHVISION:
        raise ValueError(f"no data set {name!r}: expected one of {', '.join(_TORCHVISION)}")
    argument, train, val = _TORCHVISION[name]
    factory: Any = getattr(importlib.import_module("torchvision.datasets"), name)
    chosen = {argument: train if split == "train" else val}
    try:
        data: Any = factory(os.fspath(root), download=download, **chosen)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"torchvision:{name} cannot be opened: {reason}") from error
    labels = np.asarray(getattr(data, "targets", getattr(data, "labels", None)), dtype=np.int64)
    classes = getattr(data, "classes", None) or map(str, range(int(labels.max()) + 1))
    about: dict[str, object] = {"data": f"torchvision:{name}", "split": split}
    return MemoryImages(lambda i: data[i][0], labels, tuple(classes), about)


def from_digits(*, split: Split = "train") -> MemoryImages:
    """Open scikit-learn's 1,797 handwritten digits, enlarged from 8 x 8 to 32 x 32 pixels.

    Every fifth image belongs to the split val.
    """
    data: Any = importlib.import_module("sklearn.datasets").load_digits()
    is_val = np.arange(len(data.target)) % _DIGITS_VAL_EVERY == 0
    chosen = is_val if split == "val" else ~is_val
    grey = np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)

    def get(i: int) -> Image.Image:
        return Image.fromarray(grey[i]).resize((_DIGITS_SIDE,) * 2, Image.Resampling.BICUBIC)

    classes = tuple(str(name) for name in data.target_names)
    about: dict[str, object] = {"data": "digits", "split": split}
    return MemoryImages(get, np.asarray(data.target[chosen], dtype=np.int64), classes, about)


def open_images(
    source: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    labelled: bool = True,
    split: Split = "train",
) -> SampleIndex | MemoryImages:
    """Open a folder, a list file, `torchvision:NAME`, `digits`, or one of these layouts:

    - `imagenet-val:TRUTH`: `root` is the flat folder of images; TRUTH as in
      `pipelines.datasets.imagenet.imagenet_val`;
    - `imagenet-subset:LIST`: `root` is the folder of class folders, LIST names the images to take;
    - `inaturalist:JSON`: `root` is the folder of train_val2018;
    - `voc2007:SPLIT`: `root` is the folder VOC2007. Its labels are dropped.

    Args:
        source: One of the above. For a folder or file named `digits`, write `./digits`.
        root: As above. List files: the folder that paths are relative to (None: the folder of the
            list). torchvision: the folder of its data (None: `data`).
        labelled: False drops the labels, and takes all images below a folder.
        split: For torchvision and digits only; a folder or list is one split.

    Raises:
        FileNotFoundError: The data does not exist, or torchvision cannot download it.
        ValueError: The data exists but is not a data set, `root` is missing, or there is no such
            split.
    """
    found: SampleIndex | MemoryImages
    source = os.fspath(source)
    check("split", split, Split)
    kind, _, name = source.partition(":")
    if kind in _LAYOUTS and name:
        if root is None:
            raise ValueError(f"{source!r} needs a root: the folder of the images")
        found = _LAYOUTS[kind](name, root)
    elif source.startswith("torchvision:"):
        found = from_torchvision(name, root=root or "data", split=split, download=True)
    elif source == "digits":
        found = from_digits(split=split)
    elif Path(source).is_dir():
        if root is not None:
            raise IndexFormatError("root is for list files, not for folders")
        return SampleIndex.from_folder(source, labelled=labelled)
    elif Path(source).is_file():
        found = SampleIndex.from_list(source, root=root)
    else:
        raise FileNotFoundError(
            f"{source!r} is not a folder, list file, torchvision:NAME, digits, or KIND:NAME with "
            f"KIND one of {', '.join(_LAYOUTS)}"
        )
    if labelled:
        return found
    return replace(found, labels=np.full(len(found), -1, np.int64), classes=())
