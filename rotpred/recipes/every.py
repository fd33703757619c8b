"""All recipes by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rotpred.recipes import detection, linear, pretrain, rotation, segmentation
from rotpred.recipes import finetune as semi
from rotpred.recipes import svm as frozen

PRETRAINING = pretrain.RECIPES

EVALUATION: dict[str, Callable[[], Any]] = {
    **linear.RECIPES,
    **semi.RECIPES,
    **frozen.RECIPES,
    **rotation.RECIPES,
    **detection.RECIPES,
    **segmentation.RECIPES,
}
