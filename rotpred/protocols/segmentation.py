"""Segmentation: training of a fully convolutional network, exact mean IoU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from pipelines.datasets.annotations import IGNORED
from pipelines.dense.batch import DenseBatch
from pipelines.dense.loader import DenseLoader
from pipelines.storage import replaced
from rotpred.distributed import Rank
from rotpred.metrics.classification import Confusion
from rotpred.metrics.predictions import read_masks
from rotpred.models.base import Backbone
from rotpred.models.fcn import Fcn, pixel_loss, resize_logits
from rotpred.plots.detections import CITYSCAPES_PALETTE, masks_figure, voc_palette
from rotpred.protocols import dense
from rotpred.protocols.scoring import Validation
from rotpred.recipes.segmentation import Segmentation
from rotpred.training.state import LossAndLogs, TrainState

Mask = npt.NDArray[np.uint8]

SHOWN = 4
"""Validation images in the figure."""


def run(recipe: Segmentation, rank: Rank) -> Path:
    """Train and compute exact mean IoU, or score a folder of predictions; write the run folder.

    Returns:
        The run folder.

    Raises:
        ValueError: The weights, data, predictions and recipe do not fit together.
        Stopped: A signal ended the run after a checkpoint.
    """
    if recipe.predictions:
        return dense.score_predictions(recipe, rank, SegmentationTask(recipe))
    return dense.run(recipe, rank, SegmentationTask(recipe))


class SegmentationTask:
    """Segmentation as a `dense.Task`."""

    def __init__(self, recipe: Segmentation) -> None:
        """Keep the recipe; nothing is loaded yet."""
        self.recipe = recipe

    def network(self, backbone: Backbone, classes: int) -> nn.Module:
        """Build the network: the dilated backbone with main and auxiliary head."""
        return Fcn(backbone, classes, dropout=self.recipe.dropout)

    def objective(self, state: TrainState, batch: DenseBatch) -> LossAndLogs:
        """Return the weighted sum of both losses, float32 (), and both with pixel accuracy to log.

        Raises:
            ValueError: The data have no masks.
        """
        if batch.masks is None:
            raise ValueError(f"{self.recipe.train.data} has no masks to learn from")
        masks, align = batch.masks, self.recipe.align_corners
        size = (masks.shape[1], masks.shape[2])
        # Makes dropout a function of seed, step and rank, so that a resumed run draws the same.
        seeds = np.random.SeedSequence([self.recipe.train.seed, state.step, state.rank.rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        with state.autocast():
            logits, auxiliary = state.model(batch.images)
        logits = resize_logits(logits, size, align_corners=align)
        decode_loss = pixel_loss(logits, masks, IGNORED)
        auxiliary = resize_logits(auxiliary, size, align_corners=align)
        auxiliary_loss = pixel_loss(auxiliary, masks, IGNORED)
        loss = decode_loss + self.recipe.aux_weight * auxiliary_loss
        counted = masks != IGNORED
        right = ((logits.detach().argmax(1) == masks) & counted).sum() / counted.sum().clamp(min=1)
        return loss, {
            "loss": loss,
            "loss/decode": decode_loss,
            "loss/auxiliary": auxiliary_loss,
            "accuracy": 100 * right,
        }

    @dense.no_cudnn_benchmark()
    def evaluate(self, state: TrainState, val: DenseLoader) -> Validation:
        """Return mean IoU over all pixels of all images, each in its stored size."""
        return _scores(self._predictions(state, val), val, state.rank)

    def score(self, predictions: Path, val: DenseLoader, rank: Rank) -> Validation:
        """Return mean IoU of a folder of predicted masks."""

        def read(i: int) -> torch.Tensor:
            mask = read_masks(predictions, val.samples, i, label_ids=self.recipe.label_ids)
            return torch.from_numpy(mask)

        mine = range(rank.rank, len(val.samples), rank.world)
        return _scores(((i, read(i)) for i in mine), val, rank, source=predictions)

    def _predictions(
        self, state: TrainState, val: DenseLoader
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield index and classes (h, w) of each of this process's images; save them if asked to.

        The padding of the batch is cut off, so results do not depend on other images.
        """
        recipe, folder = self.recipe, state.folder.parent / "predictions"

        def logits_of(image: torch.Tensor) -> torch.Tensor:
            with state.autocast():
                logits: torch.Tensor = state.module(image)
            size = (image.shape[2], image.shape[3])
            return resize_logits(logits.float(), size, align_corners=recipe.align_corners)

        for batch in val.epoch(0):
            for k in batch.valid.nonzero().flatten().tolist():
                i = int(batch.indices[k])
                height, width = batch.sizes[k].tolist()
                image = batch.images[k : k + 1, :, :height, :width]
                if recipe.test == "slide":
                    logits = slide(logits_of, image, recipe.slide_crop, recipe.slide_stride)
                else:
                    logits = logits_of(image)
                # As published: upsampled to the network's input above, to the stored image here.
                height, width = val.samples.sizes[i].tolist()
                logits = resize_logits(logits, (height, width), align_corners=recipe.align_corners)
                classes = logits.argmax(1)[0]
                if recipe.save_predictions:
                    mask = classes.to(torch.uint8).cpu().numpy()
                    save_mask(folder / f"{val.samples.names[i]}.png", mask, _palette(val))
                yield i, classes

    def identity(self) -> dict[str, object]:
        """Return the fields that define head, loss and upsampling."""
        names = ("align_corners", "aux_weight", "dropout")
        return {"model": "fcn", **{name: getattr(self.recipe, name) for name in names}}


def slide(
    logits_of: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, crop: int, stride: int
) -> torch.Tensor:
    """Return the logits of sliding windows, averaged where windows overlap.

    Windows start at multiples of the stride. One that would cross the edge is moved back to end
    there. A side shorter than the window has one window. Source: mmseg/models/segmentors/
    encoder_decoder.py, slide_inference.

    Args:
        logits_of: Maps float (1, 3, h, w) to float32 (1, classes, h, w).
        image: Float (1, 3, H, W).
        crop: Side of the window in pixels.
        stride: Pixels between windows.

    Returns:
        float32 (1, classes, H, W).
    """
    height, width = image.shape[2:]
    total: torch.Tensor | None = None
    count = torch.zeros(1, 1, height, width, device=image.device)
    for top in _starts(height, crop, stride):
        for left in _starts(width, crop, stride):
            rows, columns = slice(top, top + crop), slice(left, left + crop)
            logits = logits_of(image[:, :, rows, columns])
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], height, width)
            total[:, :, rows, columns] += logits
            count[:, :, rows, columns] += 1
    assert total is not None  # an image has at least one pixel
    return total / count


def _starts(length: int, crop: int, stride: int) -> list[int]:
    last = max(0, length - crop)
    return [*range(0, last, stride), last]


def _scores(
    predictions: Iterable[tuple[int, torch.Tensor]],
    val: DenseLoader,
    rank: Rank,
    *,
    source: Path | None = None,
) -> Validation:
    """Return mean IoU (first), pixel accuracy, mean recall, and the IoU of each class that occurs.

    Args:
        predictions: Index and classes (h, w) of each of this process's images.
        val: Classes, names, images and true masks.
        rank: All ranks call.
        source: Folder of predictions in files, which may mark pixels as ignored.

    Raises:
        ValueError: A pixel that has a class is ignored in the predictions.
    """
    confusion = Confusion(len(val.classes), device=rank.device)
    shown: dict[int, Mask] = {}
    for i, predicted in predictions:
        truth = torch.from_numpy(val.samples.mask(i)).to(rank.device)
        counted = truth != IGNORED
        predicted = predicted.to(rank.device)
        if source is not None and ((predicted == IGNORED) & counted).any():
            raise ValueError(
                f"{source}: {val.samples.names[i]} has {IGNORED} (ignored) at pixels that have a "
                "class"
            )
        confusion.update(predicted, truth, counted)
        if rank.main and len(shown) < SHOWN:
            shown[i] = predicted.to(torch.uint8).cpu().numpy()
    result = confusion.compute(rank)
    values = {"mIoU": result.mean_iou, "accuracy": result.accuracy}
    values["mean recall"] = result.mean_recall
    for name, iou in zip(val.classes, result.iou, strict=True):
        if iou is not None:
            values[f"IoU/{name}"] = iou
    figures = {}
    if shown:
        figures["masks"] = masks_figure(
            dense.images_of(val.samples, shown),
            list(shown.values()),
            [val.samples.mask(i) for i in shown],
            val.classes,
            _palette(val),
        )
    return dense.validation(values, len(val.samples), figures)


def save_mask(path: Path, mask: Mask, palette: Mask) -> None:
    """Write a mask of class ids as a PNG file with a palette.

    Args:
        path: Written atomically; its folder is created.
        mask: uint8 (h, w).
        palette: uint8 (classes, 3): RGB colors.
    """
    image = Image.fromarray(mask)
    image.putpalette(palette.tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        image.save(temporary, format="PNG")


def _palette(val: DenseLoader) -> Mask:
    cityscapes = val.spec.data.startswith("cityscapes:")
    return CITYSCAPES_PALETTE if cityscapes else voc_palette(len(val.classes))
