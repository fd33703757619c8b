"""Self-supervised pretraining by rotation prediction, and its transfer benchmarks.

Public: the names in `__all__`, imported when they are first used, so that `import rotpred` does not
load torch. Command lines: `rotpred.cli` (pretrain.py, evaluate.py), `rotpred.program` (the others).
Imports `pipelines`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pipelines import __version__

if TYPE_CHECKING:
    from rotpred.models.backbone import build_backbone
    from rotpred.models.heads import make_rotnet
    from rotpred.weights.export import export_backbone
    from rotpred.weights.load import load_backbone, read_backbone, save_backbone

__all__ = [
    "__version__",
    "build_backbone",
    "export_backbone",
    "load_backbone",
    "make_rotnet",
    "read_backbone",
    "save_backbone",
]

_MODULES = {
    "build_backbone": "rotpred.models.backbone",
    "export_backbone": "rotpred.weights.export",
    "load_backbone": "rotpred.weights.load",
    "make_rotnet": "rotpred.models.heads",
    "read_backbone": "rotpred.weights.load",
    "save_backbone": "rotpred.weights.load",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
