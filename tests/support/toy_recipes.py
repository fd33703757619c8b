"""Published recipes, reduced to run in seconds on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.dense.spec import FitWithin, RatioCrop, ShortSide
from pipelines.spec import CenterCrop, RandomResizedCrop
from rotpred.models.detection.settings import Proposals
from rotpred.recipes import detection, finetune, segmentation
from rotpred.recipes.detection import Detection
from rotpred.recipes.finetune import FineTuning
from rotpred.recipes.segmentation import Segmentation
from rotpred.training.settings import Optim, RunSettings
from tests.support.classification_trees import Trees


def toy_detection(name: str, roots: dict[str, Path], out: Path, **changes: Any) -> Detection:
    """A published recipe at toy size: short side 32, one epoch of three steps of two images."""
    made, root = detection.RECIPES[name](), str(roots[name])
    sides = (16, 32) if made.model == "faster_rcnn_c4" else (8, 16, 32, 64, 128)
    base = replace(
        made,
        weights="random",
        backbone="resnet18_tiny",
        sync_bn="off",
        proposals=Proposals(anchors=sides, before=(40, 20), after=(20, 4), rois=4, pooled=6),
        train=replace(
            made.train, root=root, batch_size=2, geometry=ShortSide((32, 40), 64),
            steps_per_epoch=3, workers=1,
        ),
        val=replace(made.val, root=root, geometry=ShortSide((32,), 64), workers=1, max_samples=3),
        # A low rate, so that after three steps all three COCO classes are still probable.
        optim=Optim(lr=0.001 if made.model == "mask_rcnn_fpn" else 0.01, weight_decay=1e-4),
        run=RunSettings(
            out=str(out), epochs=1, precision="fp32", device="cpu",
            log_every_steps=1, keep_checkpoints=2,
        ),
    )  # fmt: skip
    return replace(base, **changes)


def toy_segmentation(name: str, roots: dict[str, Path], out: Path, **changes: Any) -> Segmentation:
    """A published recipe at toy size: crops of 40, two epochs of two steps of two images."""
    made, root = segmentation.RECIPES[name](), str(roots[name])
    frame: dict[str, Any] = {"long": 64, "short": 40}
    base = replace(
        made,
        weights="random",
        backbone="resnet18_tiny",
        sync_bn="off",
        train=replace(
            made.train, root=root, batch_size=2, geometry=RatioCrop(40, **frame),
            steps_per_epoch=2, workers=1,
        ),
        val=replace(
            made.val, root=root, batch_size=2, geometry=FitWithin(**frame), workers=1, max_samples=5
        ),
        optim=Optim(lr=0.01, weight_decay=5e-4),
        slide_crop=33,
        slide_stride=20,
        save_predictions=True,
        run=RunSettings(
            out=str(out), epochs=2, precision="fp32", device="cpu",
            log_every_steps=1, keep_checkpoints=2,
        ),
    )  # fmt: skip
    return replace(base, **changes)


def toy_fine_tuning(trees: Trees, out: Path, backbone: str = "nin3", **changes: Any) -> FineTuning:
    """in1k_semi_1 on two images per class: 32 pixels, 4 images per step, two epochs."""
    tree, made = trees["in1k_semi_1"], finetune.RECIPES["in1k_semi_1"]()
    common: dict[str, Any] = {"engine": "folder", "workers": 1, "batch_size": 4}
    base = replace(
        made,
        weights="random",
        backbone=backbone,
        sync_bn="off",
        train=replace(
            made.train, data=tree.train, root=tree.train_root, crop=RandomResizedCrop(32), **common
        ),
        val=replace(
            made.val, data=tree.val, root=tree.val_root, crop=CenterCrop(32, 36), **common
        ),
        optim=Optim(lr=0.01, weight_decay=5e-4),
        run=RunSettings(
            out=str(out), epochs=2, precision="fp32", device="cpu",
            log_every_steps=1, keep_checkpoints=2,
        ),
    )  # fmt: skip
    return replace(base, **changes)
