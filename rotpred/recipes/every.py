"""Tables of all recipes by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rotpred.recipes import detection, finetune, knn, linear, pretrain, rotation, segmentation, svm

PRETRAINING = pretrain.RECIPES
"""Recipes of scripts/pretrain.py."""

EVALUATION: dict[str, Callable[[], Any]] = {
    **linear.RECIPES,
    **finetune.RECIPES,
    **svm.RECIPES,
    **knn.RECIPES,
    **rotation.RECIPES,
    **detection.RECIPES,
    **segmentation.RECIPES,
}
"""Recipes of scripts/evaluate.py."""
