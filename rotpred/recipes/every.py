"""All recipes by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rotpred.recipes import detection, frozen, linear, pretrain, rotation, segmentation, semi

PRETRAINING = pretrain.RECIPES

EVALUATION: dict[str, Callable[[], Any]] = {
    **linear.RECIPES,
    **semi.RECIPES,
    **frozen.RECIPES,
    **rotation.RECIPES,
    **detection.RECIPES,
    **segmentation.RECIPES,
}
