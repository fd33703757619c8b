"""What can be turned into a beton: files, or images in memory, behind one protocol."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.datasets.files import IndexFormatError
from pipelines.datasets.imagenet import imagenet_subset, imagenet_val
from pipelines.datasets.inaturalist import inaturalist
from pipelines.datasets.index import SampleIndex
from pipelines.datasets.voc_classification import voc2007

Split = Literal["train", "val"]

# Data set: the argument that selects a split, and its values for train and val.
_TORCHVISION: dict[str, tuple[str, object, object]] = {
    "CIFAR10": ("train", True, False),
    "CIFAR100": ("train", True, False),
    "MNIST": ("train", True, False),
    "FashionMNIST": ("train", True, False),
    "SVHN": ("split", "train", "test"),
    "STL10": ("split", "train", "test"),
}
# Layouts that need a root: what follows the colon, and the root, to an index.
_CATALOGUES: dict[str, Callable[[str, str | os.PathLike[str]], SampleIndex]] = {
    "imagenet-val": lambda truth, root: imagenet_val(root, truth=truth),
    "imagenet-subset": lambda names, root: imagenet_subset(names, SampleIndex.from_folder(root)),
    "inaturalist": lambda annotations, root: inaturalist(annotations, root=root),
    "voc2007": lambda split, root: voc2007(root, split=split).images,
}
_DIGITS_SIDE = 32
_DIGITS_VAL_EVERY = 5


class Images(Protocol):
    """A finite, ordered set of images. `SampleIndex` is one."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """(N,): class ids; -1 where there are no labels."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by id; empty without labels."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes | npt.NDArray[np.uint8]:
        """An encoded image, or uint8 (H, W, 3) pixels; may raise `OSError` or `ValueError`."""

    def name(self, i: int) -> str:
        """What to call sample `i` in reports."""

    def size(self, i: int) -> int:
        """About how many bytes sample `i` takes when it is encoded."""

    def describe(self) -> dict[str, object]:
        """What this is, for the manifest: JSON types, no absolute paths."""


@dataclass(frozen=True, eq=False)
class MemoryImages:
    """Images that a function hands out: arrays, or another library's data set."""

    get: Callable[[int], bytes | npt.NDArray[np.uint8] | Image.Image]
    """Sample i as an encoded image, as uint8 (H, W, 3) or (H, W), or as a Pillow image."""
    labels: npt.NDArray[np.int64]
    """(N,): class ids; -1 where there are no labels."""
    classes: tuple[str, ...]
    """Class names by id; empty without labels."""
    about: dict[str, object] = field(default_factory=dict)
    """What `describe` returns beside the number of samples."""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> bytes | npt.NDArray[np.uint8]:
        """Sample `i`: encoded, or uint8 (H, W, 3)."""
        image = self.get(i)
        if isinstance(image, bytes):
            return image
        if isinstance(image, Image.Image):
            return np.asarray(image.convert("RGB"))
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise ValueError(f"pixels are {image.dtype} {image.shape}, not uint8 (H, W, 3)")
        if image.ndim == 2:
            return np.repeat(image[:, :, None], 3, axis=2)
        if image.shape[2] != 3:
            raise ValueError(f"pixels are {image.shape}, not (H, W, 3)")
        return image

    def name(self, i: int) -> str:
        """What to call sample `i`: its number."""
        return f"#{i}"

    def size(self, i: int) -> int:
        """Half of the pixels' bytes: JPEG at high quality rarely needs more."""
        try:
            image = self.read(i)
        except (OSError, ValueError):
            return 0  # The conversion reports it; this is an estimate only.
        return len(image) if isinstance(image, bytes) else image.nbytes // 2 + 1024

    def describe(self) -> dict[str, object]:
        """What this is."""
        return {"kind": "memory", **self.about, "samples": len(self)}


def from_torchvision(
    name: str, *, root: str | os.PathLike[str], split: Split = "train", download: bool = False
) -> MemoryImages:
    """One of torchvision's small classification data sets, by name.

    Args:
        name: CIFAR10, CIFAR100, MNIST, FashionMNIST, SVHN or STL10.
        root: Where torchvision keeps it.
        split: val is the data set's test part.
        download: Fetch it where it is missing.

    Raises:
        ValueError: There is no such data set here.
        FileNotFoundError: It is not below `root`, or cannot be downloaded.
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
        raise FileNotFoundError(f"torchvision:{name} cannot be had: {reason}") from error
    labels = np.asarray(getattr(data, "targets", getattr(data, "labels", None)), dtype=np.int64)
    classes = getattr(data, "classes", None) or map(str, range(int(labels.max()) + 1))

    def get(i: int) -> Image.Image:
        image: Image.Image = data[i][0]
        return image

    about: dict[str, object] = {"data": f"torchvision:{name}", "split": split}
    return MemoryImages(get, labels, tuple(classes), about)


def from_digits(*, split: Split = "train") -> MemoryImages:
    """Scikit-learn's 1,797 handwritten digits, 8 x 8 enlarged to 32 x 32; every fifth is val."""
    data: Any = importlib.import_module("sklearn.datasets").load_digits()
    held = np.arange(len(data.target)) % _DIGITS_VAL_EVERY == 0
    chosen = held if split == "val" else ~held
    grey = np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)

    def get(i: int) -> Image.Image:
        return Image.fromarray(grey[i]).resize((_DIGITS_SIDE,) * 2, Image.Resampling.BICUBIC)

    classes = tuple(str(name) for name in data.target_names)
    about: dict[str, object] = {"data": "digits", "split": split}
    return MemoryImages(get, np.asarray(data.target[chosen], dtype=np.int64), classes, about)


def open_images(
    source: str,
    *,
    root: str | os.PathLike[str] | None = None,
    labelled: bool = True,
    split: Split = "train",
    download: bool = True,
) -> Images:
    """Resolve what a person names: a folder, a list file, `torchvision:NAME`, `digits`, or one of

    - `imagenet-val:TRUTH`, the flat folder `root`, TRUTH as in `catalogues.imagenet_val`;
    - `imagenet-subset:LIST`, those images of the class folders in `root`;
    - `inaturalist:JSON`, with `root` the folder of train_val2018;
    - `voc2007:SPLIT`, with `root` the folder VOC2007; its many labels are not kept.

    Args:
        source: The name. A folder or file of the name `digits` is written `./digits`.
        root: As above; or the folder that a list's paths are relative to (None: the list's own), or
            where torchvision keeps its data (None: `data`).
        labelled: False drops the labels, and takes a folder's images wherever they lie.
        split: For torchvision and digits; folders and lists are one split each.
        download: Whether torchvision may fetch what is missing.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It exists, but is no data set.
    """
    found: Images
    kind, _, name = source.partition(":")
    if kind in _CATALOGUES and name:
        if root is None:
            raise ValueError(f"{source!r} needs a root: the folder of its images")
        found = _CATALOGUES[kind](name, root)
    elif source.startswith("torchvision:"):
        found = from_torchvision(name, root=root or "data", split=split, download=download)
    elif source == "digits":
        found = from_digits(split=split)
    elif Path(source).is_dir():
        if root is not None:
            raise IndexFormatError("a root goes with a list file, not with a folder")
        return SampleIndex.from_folder(source, labelled=labelled)
    elif Path(source).is_file():
        found = SampleIndex.from_list(source, root=root)
    else:
        raise FileNotFoundError(
            f"{source!r} is no folder, list file, torchvision:NAME or digits, nor "
            f"KIND:NAME with KIND one of {', '.join(_CATALOGUES)}"
        )
    return found if labelled else _unlabelled(found)


def _unlabelled(images: Images) -> Images:
    """The same images without labels."""
    labels = np.full(len(images), -1, np.int64)
    if isinstance(images, SampleIndex):
        return SampleIndex(images.root, images.blob, images.offsets, labels, ())
    return MemoryImages(images.read, labels, (), images.describe())
