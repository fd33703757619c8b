"""Protocols on a GPU: they run, and results match a CPU where they must."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.device.color_jitter import draw_jitter, jitter_views
from pipelines.spec import IMAGENET, ColorJitter
from rotpred.distributed import Rank
from rotpred.protocols import detection, finetune, segmentation
from rotpred.protocols.knn import neighbours
from rotpred.recipes.svm import COSTS
from rotpred.svm.dual import gram, solve
from tests.support import dense_trees
from tests.support.classification_trees import make_trees
from tests.support.run_outputs import results, saved
from tests.support.toy_recipes import toy_detection, toy_fine_tuning, toy_segmentation

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

DEVICE = torch.device("cuda:0")
HERE = torch.device("cpu")


def check(out: Path) -> None:
    """A finished run: finite losses, results, a saved network."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses and all(math.isfinite(loss) for loss in losses)
    assert results(out) and all(tensor.isfinite().all() for tensor in saved(out).values())
    assert (out / "done.json").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["voc0712_det", "coco_det"])
def test_detection_trains_and_validates(name: str, precision: Any, tmp_path: Path) -> None:
    roots = {name: getattr(dense_trees, {"v": "voc", "c": "coco"}[name[0]])(tmp_path, n=3)}
    made = toy_detection(name, roots, tmp_path / "run")
    detection.run(replace(made, run=replace(made.run, precision=precision)), Rank(device=DEVICE))
    check(tmp_path / "run")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_segmentation_trains_and_validates(precision: Any, tmp_path: Path) -> None:
    roots = {"voc12aug_seg": dense_trees.voc_masks(tmp_path, n=8, side=48)}
    made = toy_segmentation("voc12aug_seg", roots, tmp_path / "run")
    segmentation.run(replace(made, run=replace(made.run, precision=precision)), Rank(device=DEVICE))
    check(tmp_path / "run")


def test_fine_tuning_twice_gives_the_same_weights(tmp_path: Path) -> None:
    """Only deterministic kernels are used."""
    trees = make_trees(tmp_path)
    for name in ("a", "b"):
        made = toy_fine_tuning(trees, tmp_path / name, "resnet18_tiny")
        finetune.run(made, Rank(device=DEVICE))
        check(tmp_path / name)
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_neighbours_are_those_of_a_cpu() -> None:
    """Small integers, whose sums of products are exact in any order; many are equal."""
    generator = np.random.default_rng(0)
    bank, queries = (generator.integers(-3, 4, (n, 64)).astype(np.float32) for n in (500, 70))
    here, there = (
        neighbours(bank, queries, k=20, normalize=False, device=device, tick=lambda _: None)
        for device in (HERE, DEVICE)
    )
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


def test_svms_are_those_of_a_cpu() -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((60, 100)).astype(np.float32)
    signs = torch.from_numpy(np.where(rows[:, 0] > 0, 1.0, -1.0))[None]
    costs = torch.tensor(COSTS, dtype=torch.float64)
    decisions = []
    for device in (HERE, DEVICE):
        kernel, there = gram(rows, rows, device), signs.to(device)
        beta = solve(kernel[None], there, torch.ones_like(there), costs.to(device))
        decisions.append((kernel @ beta[0]).cpu())
    torch.testing.assert_close(*decisions, rtol=1e-6, atol=1e-6)


def test_colors_are_those_of_a_cpu() -> None:
    crops = torch.randint(0, 256, (6, 24, 24, 3), generator=torch.Generator().manual_seed(0))
    crops = crops.to(torch.uint8)
    color = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, lighting=0.1)
    here, there = (
        jitter_views(
            crops.to(device),
            draw_jitter(color, seed=0, epoch=1, indices=np.arange(6)),
            normalize=IMAGENET,
            dtype=torch.float32,
        ).cpu()
        for device in (HERE, DEVICE)
    )
    # Levels are rounded between the operations: one bit of difference may become one level of 255.
    apart = (here - there).abs()
    assert apart.max() < 0.05 and apart.mean() < 1e-4


def test_the_imagenet_recipe_under_torchrun(beton: Path, tmp_path: Path) -> None:
    """On one GPU; its SyncBN has nothing to synchronise there."""
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
        *(str(Path(__file__).parents[2] / "scripts/pretrain.py"), "rotnet_in1k_r50"),
        *("--backbone", "resnet18_tiny", "--train.data", str(beton), "--val.data", str(beton)),
        *("--train.batch-size", "8", "--val.batch-size", "8", "--train.crop.size", "32"),
        *("--val.crop.size", "32", "--val.crop.resize", "36", "--run.epochs", "1"),
        *("--run.log-every-steps", "1", "--run.out", str(tmp_path / "run")),
    ]
    subprocess.run(words, check=True, timeout=240)
    check(tmp_path / "run")
