"""Detection overfits eight images, each recipe at reduced size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.dense.spec import ShortSide
from rotpred.distributed import Rank
from rotpred.models.detection.settings import Proposals
from rotpred.protocols import detection
from rotpred.recipes.detection import RECIPES
from rotpred.training.schedule import Steps
from rotpred.training.settings import RunSettings
from tests.support.dense_trees import coco, voc


@pytest.mark.overfit
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "side", "anchors", "steps", "metrics"),
    [
        ("voc0712_det", 96, (24, 48, 80), 300, ("AP50",)),
        ("coco_det", 64, (8, 16, 32, 64, 128), 160, ("box/AP50", "mask/AP50")),
    ],
)
def test_eight_images_are_overfitted(
    name: str,
    side: int,
    anchors: tuple[int, ...],
    steps: int,
    metrics: tuple[str, ...],
    tmp_path: Path,
) -> None:
    """AP50 on the training images, from random weights, with recipe overrides only."""
    made = RECIPES[name]()
    root = str(voc(tmp_path, n=4) if name == "voc0712_det" else coco(tmp_path, n=8))
    seen = {"root": root, "geometry": ShortSide((side,), 256), "workers": 1, "batch_size": 2}
    made = replace(
        made,
        weights="random",
        backbone="resnet18_tiny",
        sync_bn="off",
        proposals=Proposals(anchors, before=(100, 40), after=(40, 12), rois=16, pooled=6),
        train=replace(made.train, steps_per_epoch=steps, flip=False, **seen),
        val=replace(made.val, data=made.train.data, **seen),
        optim=replace(made.optim, lr=0.03, reference_batch=None),
        schedule=Steps((0.8,), warmup_epochs=0.1, warmup_start_factor=0.01),
        run=RunSettings(
            out=str(tmp_path / "run"), epochs=1, precision="fp32", device="cpu",
            log_every_steps=20,
        ),
    )  # fmt: skip
    detection.run(made, Rank())
    rows = json.loads((tmp_path / "run/results.json").read_text())
    found = {row["metric"]: row["value"] for row in rows}
    assert min(found[metric] for metric in metrics) > 90, found
