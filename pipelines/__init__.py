"""Image data loading: files or betons in, batches of views on a device out.

Public: the names in `__all__`. Each is imported when it is first used, so that `import pipelines`
loads neither torch nor an engine. Modules below are public where their package says so.
Imports nothing of `rotpred`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.batch import Batch
    from pipelines.conversion.convert import write_beton
    from pipelines.datasets.images import open_images
    from pipelines.datasets.index import SampleIndex
    from pipelines.dense.batch import DenseBatch
    from pipelines.dense.loader import DenseLoader, open_dense
    from pipelines.dense.spec import DenseSpec, FitWithin, RatioCrop, ShortSide
    from pipelines.loader import Loader, open_loader
    from pipelines.spec import (
        CIFAR10,
        IMAGENET,
        CenterCrop,
        ColorJitter,
        LoaderSpec,
        Normalize,
        RandomCrop,
        RandomResizedCrop,
        Resize,
        Shard,
    )  # fmt: skip

__version__ = "0.3.0"

__all__ = [
    "CIFAR10", "IMAGENET", "Batch", "CenterCrop", "ColorJitter", "DenseBatch", "DenseLoader",
    "DenseSpec", "FitWithin", "Loader", "LoaderSpec", "Normalize", "RandomCrop",
    "RandomResizedCrop", "RatioCrop", "Resize", "SampleIndex", "Shard", "ShortSide", "__version__",
    "open_dense", "open_images", "open_loader", "write_beton",
]  # fmt: skip

_MODULES = {
    "Batch": "pipelines.batch",
    "DenseBatch": "pipelines.dense.batch",
    "DenseLoader": "pipelines.dense.loader",
    "DenseSpec": "pipelines.dense.spec",
    "FitWithin": "pipelines.dense.spec",
    "Loader": "pipelines.loader",
    "RatioCrop": "pipelines.dense.spec",
    "SampleIndex": "pipelines.datasets.index",
    "ShortSide": "pipelines.dense.spec",
    "open_dense": "pipelines.dense.loader",
    "open_images": "pipelines.datasets.images",
    "open_loader": "pipelines.loader",
    "write_beton": "pipelines.conversion.convert",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_MODULES.get(name, "pipelines.spec")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
