"""Detection: training of a two-stage detector, and exact average precision."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipelines.datasets.coco import api
from pipelines.dense.batch import DenseBatch
from pipelines.dense.loader import DenseLoader
from pipelines.imaging.torchvision_decode import decode
from rotpred.distributed import Rank, broadcast_str
from rotpred.metrics.coco_detection import coco_metrics
from rotpred.metrics.detections import ImageDetections
from rotpred.metrics.predictions import gather_detections, read_detections, write_detections
from rotpred.metrics.voc_detection import voc_metrics
from rotpred.models.base import Backbone
from rotpred.models.detection.rcnn import faster_rcnn_c4, mask_rcnn_fpn
from rotpred.models.detection.roi_heads import Detections, paste_masks
from rotpred.plots.detections import boxes_figure
from rotpred.protocols import dense
from rotpred.protocols.dense import DenseResult
from rotpred.recipes.detection import Detection
from rotpred.training.state import LossAndLogs, TrainState

logger = logging.getLogger(__name__)

SHOWN = 6
"""Validation images in the figure."""

PREDICTIONS = "predictions.json"
"""What the last validation found, in the run folder, as COCO's JSON results."""


def run(recipe: Detection, rank: Rank) -> Path:
    """Train and count exact average precision, or score a file; write the run folder.

    Raises:
        ValueError: weights, data, predictions and recipe do not fit together, in words.
        Stopped: a signal ended the run after a checkpoint.
    """
    if recipe.predictions:
        return score(recipe, rank)
    if recipe.run.compile:
        raise ValueError(
            f"{recipe.name} has images of many sizes, for each of which torch.compile would "
            "begin anew: pass --run.no-compile"
        )
    if has_masks(recipe) and not recipe.train.masks:
        raise ValueError(f"{recipe.name}: {recipe.model} learns masks: pass --train.masks")
    if recipe.train.data.startswith("coco:") and recipe.train.masks and not has_masks(recipe):
        logger.info("%s learns no masks: those of %s stay away", recipe.model, recipe.train.data)
        recipe = replace(recipe, train=replace(recipe.train, masks=False))
    with dense.any_shape():
        return dense.run(recipe, rank, Detect)


class Detect:
    """What detection does differently: `dense.Task`."""

    def __init__(self, recipe: Detection) -> None:
        """Touch nothing yet."""
        self.recipe = recipe

    def network(self, backbone: Backbone, classes: int) -> nn.Module:
        """The detector around the backbone."""
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
        """The sum of all losses, each in float32 and logged."""
        # The random choice of proposals is a function of seed, step and image: a run that goes
        # on draws the same, and so does one of another number of processes.
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

    def evaluate(self, state: TrainState, val: DenseLoader) -> DenseResult:
        """Average precision over all images; what was found is written into the run folder."""
        mine: dict[int, ImageDetections] = {}
        for batch in val.epoch(0):
            with state.autocast():
                results: list[Detections] = state.module(batch.images, batch.sizes.tolist())
            for k in batch.valid.nonzero().flatten().tolist():
                size, original = batch.sizes[k].tolist(), batch.originals[k].tolist()
                mine[int(batch.indices[k])] = stored(results[k], size, original)
        found = gather_detections(mine, len(val.samples), state.rank)
        if state.rank.main:
            write_detections(state.folder.parent / PREDICTIONS, found, val.samples)
        masks = has_masks(self.recipe)
        return evaluation(val, found, masks=masks, rank=state.rank)

    def identity(self) -> dict[str, object]:
        """The detector."""
        recipe = self.recipe
        about = {"model": recipe.model, "proposals": vars(recipe.proposals)}
        return about | ({"box_head": recipe.box_head} if recipe.model == "mask_rcnn_fpn" else {})


def has_masks(recipe: Detection) -> bool:
    """Whether masks of objects are learnt and predicted."""
    return recipe.model == "mask_rcnn_fpn" and recipe.train.data.startswith("coco:")


def stored(result: Detections, size: Sequence[int], original: Sequence[int]) -> ImageDetections:
    """Detections in the pixels of the image as it is stored, masks as run lengths.

    Args:
        result: in the pixels of the resized image.
        size: its height and width.
        original: those of the stored image.
    """
    height, width = original
    down, across = height / size[0], width / size[1]
    boxes = result["boxes"].float()
    boxes = boxes * boxes.new_tensor([across, down, across, down])
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    masks: list[dict[str, object]] = []
    if "masks" in result:
        run_lengths = api("mask")
        for plane in paste_masks(result["masks"], boxes, (height, width)).cpu().numpy():
            lengths = run_lengths.encode(np.asfortranarray(plane, dtype=np.uint8))
            masks.append({"size": [height, width], "counts": lengths["counts"].decode("ascii")})
    return ImageDetections(
        boxes.cpu().numpy(),
        result["labels"].cpu().numpy() - 1,
        result["scores"].float().cpu().numpy(),
        tuple(masks),
    )


def evaluation(
    val: DenseLoader, found: Sequence[ImageDetections], *, masks: bool, rank: Rank
) -> DenseResult:
    """Average precision by the rules of the data set; all ranks call, the main one has a figure.

    Args:
        val: whose data are compared with.
        found: one per image.
        masks: of COCO's data, compare masks as well.
        rank: of this process.
    """
    samples = val.samples

    def count() -> dict[str, float]:
        if val.spec.data.startswith("coco:"):
            return coco_metrics(found, samples, masks=masks)
        return voc_metrics(found, samples)

    values = _by_main(count, rank)
    figures = {}
    if rank.main:
        some = range(min(SHOWN, len(samples)))
        images = [decode(samples.path(i).read_bytes()).permute(1, 2, 0).numpy() for i in some]
        figures["detections"] = boxes_figure(
            images,
            [found[i] for i in some],
            samples.classes,
            truth=[samples.objects(i) for i in some],
        )
    return DenseResult(values, n=len(samples), figures=figures)


def _by_main(count: Callable[[], dict[str, float]], rank: Rank) -> dict[str, float]:
    """What the main process counts, on all ranks: pycocotools takes gigabytes in each that does."""
    said: dict[str, dict[str, float] | str] = {}
    if rank.main:
        try:
            said["values"] = count()
        except ValueError as error:
            said["error"] = str(error)
    said = json.loads(broadcast_str(json.dumps(said), rank))
    if isinstance(values := said.get("values"), dict):
        return values
    raise ValueError(said["error"])


def score(recipe: Detection, rank: Rank) -> Path:
    """Compare a file of detections with the validation data, and write the run folder.

    Raises:
        ValueError: an entry is of an unknown image or class, or senseless; it says which.
    """

    def count(val: DenseLoader) -> DenseResult:
        found = read_detections(Path(recipe.predictions), val.samples)
        return evaluation(val, found, masks=any(one.masks for one in found), rank=rank)

    return dense.score(recipe, rank, count)
