"""Detection: training of a two-stage detector, exact average precision."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipelines.datasets.coco import import_pycocotools
from pipelines.dense.batch import DenseBatch
from pipelines.dense.loader import DenseLoader
from rotpred.distributed import Rank, from_main
from rotpred.metrics.coco_detection import coco_metrics
from rotpred.metrics.detections import ImageDetections
from rotpred.metrics.predictions import gather_detections, read_detections, write_detections
from rotpred.metrics.voc_detection import voc_metrics
from rotpred.models.base import Backbone
from rotpred.models.detection.masks import paste_masks
from rotpred.models.detection.rcnn import faster_rcnn_c4, mask_rcnn_fpn
from rotpred.models.detection.roi_heads import Detections
from rotpred.plots.detections import boxes_figure
from rotpred.protocols import dense
from rotpred.protocols.scoring import Validation
from rotpred.recipes.detection import Detection
from rotpred.training.state import LossAndLogs, TrainState

logger = logging.getLogger(__name__)

SHOWN = 6
"""Validation images in the figure."""

PREDICTIONS = "predictions.json"
"""File in the run folder with the detections of the last validation, in COCO's JSON format."""


def run(recipe: Detection, rank: Rank) -> Path:
    """Train and compute exact average precision, or score a file; write the run folder.

    Returns:
        The run folder.

    Raises:
        ValueError: The weights, data, predictions and recipe do not fit together.
        Stopped: A signal ended the run after a checkpoint.
    """
    if recipe.predictions:
        return dense.score_predictions(recipe, rank, DetectionTask(recipe))
    if recipe.run.compile:
        raise ValueError(
            f"{recipe.name} has images of many sizes, and torch.compile would compile again for "
            "each: pass --run.no-compile"
        )
    if has_masks(recipe) and not recipe.train.masks:
        raise ValueError(f"{recipe.name}: {recipe.model} learns masks: pass --train.masks")
    if recipe.train.data.startswith("coco:") and recipe.train.masks and not has_masks(recipe):
        logger.info("%s learns no masks, those of %s are skipped", recipe.model, recipe.train.data)
        recipe = replace(recipe, train=replace(recipe.train, masks=False))
    with dense.no_cudnn_benchmark():
        return dense.run(recipe, rank, DetectionTask(recipe))


class DetectionTask:
    """Detection as a `dense.Task`."""

    def __init__(self, recipe: Detection) -> None:
        """Keep the recipe; nothing is loaded yet."""
        self.recipe = recipe

    def network(self, backbone: Backbone, classes: int) -> nn.Module:
        """Build the detector on the backbone."""
        recipe = self.recipe
        if recipe.model == "faster_rcnn_c4":
            return faster_rcnn_c4(backbone, classes, recipe.proposals)
        return mask_rcnn_fpn(
            backbone,
            classes,
            recipe.proposals,
            box_head=recipe.box_head,
            masks=has_masks(recipe),
        )

    def objective(self, state: TrainState, batch: DenseBatch) -> LossAndLogs:
        """Return the sum of all losses, float32 (), and every loss for the log."""
        # Proposals are sampled as a function of seed, step and image. So a resumed run samples the
        # same ones, and so does a run with another number of processes.
        seeds = [
            int(
                np.random.SeedSequence([self.recipe.train.seed, state.step, i]).generate_state(1)[0]
            )
            for i in batch.indices.tolist()
        ]
        with state.autocast():
            losses: dict[str, torch.Tensor] = state.model(
                batch.images, batch.sizes.tolist(), batch.targets, seeds
            )
        loss = torch.stack(list(losses.values())).sum()
        return loss, {"loss": loss, **{f"loss/{name}": part for name, part in losses.items()}}

    def evaluate(self, state: TrainState, val: DenseLoader) -> Validation:
        """Return average precision over all images; write the detections to the run folder."""
        mine: dict[int, ImageDetections] = {}
        for batch in val.epoch(0):
            with state.autocast():
                results: list[Detections] = state.module(batch.images, batch.sizes.tolist())
            for k in batch.valid.nonzero().flatten().tolist():
                size, original = batch.sizes[k].tolist(), batch.originals[k].tolist()
                mine[int(batch.indices[k])] = to_stored_pixels(results[k], size, original)
        found = gather_detections(mine, len(val.samples), state.rank)
        if state.rank.main:
            write_detections(state.folder.parent / PREDICTIONS, found, val.samples)
        return detection_result(val, found, masks=has_masks(self.recipe), rank=state.rank)

    def score(self, predictions: Path, val: DenseLoader, rank: Rank) -> Validation:
        """Return average precision of a file of detections."""
        found = read_detections(predictions, val.samples)
        masks = any(one.masks for one in found)
        return detection_result(val, found, masks=masks, rank=rank)

    def identity(self) -> dict[str, object]:
        """Return the fields that define the detector."""
        recipe = self.recipe
        about = {"model": recipe.model, "proposals": vars(recipe.proposals)}
        return about | ({"box_head": recipe.box_head} if recipe.model == "mask_rcnn_fpn" else {})


def has_masks(recipe: Detection) -> bool:
    """Return whether object masks are learnt and predicted."""
    return recipe.model == "mask_rcnn_fpn" and recipe.train.data.startswith("coco:")


def to_stored_pixels(
    result: Detections, size: Sequence[int], original: Sequence[int]
) -> ImageDetections:
    """Convert detections to the pixels of the stored image; masks become run lengths.

    Args:
        result: Detections in the pixels of the resized image.
        size: Height and width of the resized image.
        original: Height and width of the stored image.
    """
    height, width = original
    down, across = height / size[0], width / size[1]
    boxes = result["boxes"].float()
    boxes = boxes * boxes.new_tensor([across, down, across, down])
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    masks: list[dict[str, object]] = []
    if "masks" in result:
        run_lengths = import_pycocotools("mask")
        for plane in paste_masks(result["masks"], boxes, (height, width)).cpu().numpy():
            lengths = run_lengths.encode(np.asfortranarray(plane, dtype=np.uint8))
            masks.append({"size": [height, width], "counts": lengths["counts"].decode("ascii")})
    return ImageDetections(
        boxes.cpu().numpy(),
        result["labels"].cpu().numpy() - 1,
        result["scores"].float().cpu().numpy(),
        tuple(masks),
    )


def detection_result(
    val: DenseLoader, found: Sequence[ImageDetections], *, masks: bool, rank: Rank
) -> Validation:
    """Compute average precision by the rules of the data set. Only the main rank draws the figure.

    Args:
        val: Loader of the ground truth.
        found: One per image.
        masks: Score masks as well (COCO only).
        rank: All ranks call.

    Raises:
        ValueError: The detections cannot be scored; raised on all ranks.
    """
    samples = val.samples

    def count() -> dict[str, float]:
        if val.spec.data.startswith("coco:"):
            return coco_metrics(found, samples, masks=masks)
        return voc_metrics(found, samples)

    # Not on every rank: pycocotools takes gigabytes per process.
    values = from_main(count, rank)
    figures = {}
    if rank.main:
        some = range(min(SHOWN, len(samples)))
        figures["detections"] = boxes_figure(
            dense.images_of(samples, some),
            [found[i] for i in some],
            samples.classes,
            truth=[samples.objects(i) for i in some],
        )
    return dense.validation(values, len(samples), figures)
