"""What happens to a proposal: pooling, box head, mask head, and their losses."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from pipelines.dense.batch import Target
from rotpred.models.detection.rpn import Draws

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""What differences in x, y, log width and log height are multiplied with."""


class Detections(TypedDict, total=False):
    """What was found in an image, K objects, best first."""

    boxes: torch.Tensor
    """float32 (K, 4): left, top, right, bottom in pixels of the resized image."""
    labels: torch.Tensor
    """int64 (K,): from 1."""
    scores: torch.Tensor
    """float32 (K,)."""
    masks: torch.Tensor
    """float32 (K, s, s), s usually 28: probabilities within the box; of detectors with masks."""


class Pooler(nn.Module):
    """RoIAlign on one map, or on the map of a pyramid that fits a proposal's size.

    Aligned: a place of a map is the middle of its pixels, half a pixel off from torchvision's own
    pooler (detectron2: ROIAlignV2). As many samples per bin as it has pixels (sampling ratio 0).
    """

    def __init__(self, size: int, strides: dict[str, int]) -> None:
        """Pool to (size, size) from these maps; a name for each, with its stride in pixels."""
        super().__init__()
        self.size, self.strides = size, strides
        levels = [int(math.log2(stride)) for stride in strides.values()]
        # A proposal of 224 pixels belongs to the map of stride 16 (Lin et al. 2017, equation 1).
        self._level = LevelMapper(levels[0], levels[-1])

    def forward(self, maps: dict[str, torch.Tensor], boxes: list[torch.Tensor]) -> torch.Tensor:
        """Pooled maps (sum of K, C, size, size) of the boxes (K, 4) of every image."""
        which = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rois = torch.cat((which, torch.cat(boxes)), 1)
        if len(self.strides) == 1:
            ((name, stride),) = self.strides.items()
            return self._align(maps[name], rois, stride)
        levels = self._level(boxes)
        parts = [torch.where(levels == k)[0] for k in range(len(self.strides))]
        pooled = torch.cat(
            [
                self._align(maps[name], rois[part], stride)
                for part, (name, stride) in zip(parts, self.strides.items(), strict=True)
            ]
        )
        return pooled[torch.cat(parts).argsort()]

    def _align(self, features: torch.Tensor, rois: torch.Tensor, stride: int) -> torch.Tensor:
        pooled: torch.Tensor = roi_align(
            features, rois, self.size, 1 / stride, sampling_ratio=0, aligned=True
        )
        return pooled


class BoxPredictor(nn.Module):
    """Scores of the background and C classes, and a box for each class, in float32."""

    def __init__(self, channels: int, classes: int) -> None:
        """Start from normal 0.01 and 0.001, as detectron2 and mmdetection do."""
        super().__init__()
        self.scores = nn.Linear(channels, 1 + classes)
        self.deltas = nn.Linear(channels, 4 * classes)
        for layer, spread in ((self.scores, 0.01), (self.deltas, 0.001)):
            nn.init.normal_(layer.weight, std=spread)
            nn.init.zeros_(layer.bias)

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map (R, channels) to logits (R, 1 + C) and deltas (R, C, 4)."""
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = vectors.float()
            return self.scores(vectors), self.deltas(vectors).unflatten(1, (-1, 4))


class MaskPredictor(nn.Module):
    """A mask for each of C classes, twice as fine as the maps, in float32; Kaiming's normal."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.masks = nn.Conv2d(channels, classes, 1)
        for layer in (self.up, self.masks):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Map (R, channels, s, s) to logits (R, C, 2 s, 2 s)."""
        maps = F.relu(self.up(maps))
        with torch.autocast(maps.device.type, enabled=False):
            logits: torch.Tensor = self.masks(maps.float())
        return logits


class Heads(RoIHeads):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's heads with L1, a box for each class but the background, and aligned masks.

    512 proposals of each image, a quarter of them positive from an overlap of 0.5 on, boxes of
    the truth among them; scores above 0.05, suppression per class at 0.5, the best 100 (detectron2,
    config/defaults.py; mmdetection, faster-rcnn models).
    """

    def __init__(
        self,
        pool: Pooler,
        box_head: nn.Module,
        predictor: BoxPredictor,
        *,
        rois: int,
        mask_pool: Pooler | None = None,
        mask_head: nn.Module | None = None,
        mask_predictor: MaskPredictor | None = None,
    ) -> None:
        """Put parts together; masks where there are parts for them.

        Args:
            pool: from proposals to maps.
            box_head: from pooled maps to vectors.
            predictor: from vectors to scores and boxes.
            rois: proposals per image in training.
            mask_pool: as `pool`, for masks.
            mask_head: from pooled maps to maps.
            mask_predictor: from maps to masks.
        """
        super().__init__(
            pool, box_head, predictor,
            fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=rois,
            positive_fraction=0.25, bbox_reg_weights=BOX_WEIGHTS,
            score_thresh=0.05, nms_thresh=0.5, detections_per_img=100,
            mask_roi_pool=mask_pool, mask_head=mask_head, mask_predictor=mask_predictor,
        )  # fmt: skip
        self.fg_bg_sampler = Draws(rois, 0.25)

    def forward(
        self,
        maps: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        sizes: list[tuple[int, int]],
        targets: list[Target] | None = None,
        *,
        shared: nn.Module | None = None,
    ) -> tuple[list[Detections], dict[str, torch.Tensor]]:
        """Detections of each image in evaluation, losses in training.

        Args:
            maps: of the whole batch, by name.
            proposals: float32 (P, 4) of each image.
            sizes: height and width of each image, without padding.
            targets: the truth, in training.
            shared: applied to the pooled maps first; belongs to the backbone, not to the heads.
        """
        if self.training:
            proposals, matched, labels, truth = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(maps, proposals)
        logits, deltas = self.box_predictor(
            self.box_head(pooled if shared is None else shared(pooled))
        )
        if not self.training:
            return self._detect(maps, logits, deltas, proposals, sizes), {}
        losses = box_losses(logits, deltas, torch.cat(labels), torch.cat(truth))
        if self.has_mask():
            assert targets is not None
            positive = [torch.where(part > 0)[0] for part in labels]
            boxes = [part[keep] for part, keep in zip(proposals, positive, strict=True)]
            classes = torch.cat([part[keep] for part, keep in zip(labels, positive, strict=True)])
            goals = [
                mask_targets(target["masks"], box, which[keep], 2 * self.mask_roi_pool.size)
                for target, box, which, keep in zip(targets, boxes, matched, positive, strict=True)
            ]
            found = self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, boxes)))
            losses["mask"] = mask_loss(found, classes, torch.cat(goals))
        return [], losses

    def _detect(
        self,
        maps: dict[str, torch.Tensor],
        logits: torch.Tensor,
        deltas: torch.Tensor,
        proposals: list[torch.Tensor],
        sizes: list[tuple[int, int]],
    ) -> list[Detections]:
        # torchvision expects a box of the background as well, which it then drops.
        with_background = F.pad(deltas, (0, 0, 1, 0)).flatten(1)
        boxes, scores, labels = self.postprocess_detections(
            logits, with_background, proposals, sizes
        )
        found: list[Detections] = [
            {"boxes": box, "labels": label, "scores": score}
            for box, label, score in zip(boxes, labels, scores, strict=True)
        ]
        if self.has_mask():
            masks = self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, boxes))).sigmoid()
            masks = masks[torch.arange(len(masks), device=masks.device), torch.cat(labels) - 1]
            for one, part in zip(found, masks.split([len(box) for box in boxes]), strict=True):
                one["masks"] = part
        return found


def box_losses(
    logits: torch.Tensor, deltas: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Mean cross-entropy of R proposals, and L1 of the positive ones' own class over R.

    Args:
        logits: (R, 1 + C).
        deltas: (R, C, 4).
        labels: int64 (R,), 0 for the background.
        truth: (R, 4), as the deltas.
    """
    positive = torch.where(labels > 0)[0]
    found = deltas[positive, labels[positive] - 1]
    return {
        "cls": F.cross_entropy(logits, labels),
        "box": F.l1_loss(found, truth[positive], reduction="sum") / max(1, len(labels)),
    }


def mask_targets(
    masks: torch.Tensor, boxes: torch.Tensor, which: torch.Tensor, size: int
) -> torch.Tensor:
    """What lies of some objects' masks within boxes: 0 or 1, float32 (K, size, size).

    Args:
        masks: uint8 (N, h, w), 0 or 1, of the objects of an image.
        boxes: float32 (K, 4), in its pixels.
        which: int64 (K,), the object that each box stands for.
        size: bins on a side; one is inside where half of its samples are.
    """
    # Only the masks that are asked for, once each: as floats they take four times the memory.
    used, place = torch.unique(which, return_inverse=True)
    rois = torch.cat((place[:, None].to(boxes.dtype), boxes), 1)
    planes = masks[used][:, None].to(boxes.dtype)
    shares = roi_align(planes, rois, size, 1.0, sampling_ratio=0, aligned=True)[:, 0]
    inside: torch.Tensor = shares >= 0.5
    return inside.to(boxes.dtype)


def mask_loss(logits: torch.Tensor, labels: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy of the masks of the true classes.

    Args:
        logits: (K, C, s, s).
        labels: int64 (K,), from 1.
        goals: (K, s, s), 0 or 1.
    """
    if not len(labels):
        return logits.sum() * 0  # a mean over nothing is not a number
    own = logits[torch.arange(len(labels), device=labels.device), labels - 1]
    return F.binary_cross_entropy_with_logits(own, goals)


def paste_masks(
    masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], threshold: float = 0.5
) -> torch.Tensor:
    """Masks within boxes as masks of an image: bool (K, h, w), on the masks' device.

    Bilinear, at the middle of each pixel; outside of the box there is nothing.

    Args:
        masks: (K, s, s), probabilities.
        boxes: (K, 4), in pixels of the image.
        size: its height and width.
        threshold: probability from which on a pixel belongs to the object.
    """
    height, width = size
    pasted = torch.zeros((len(masks), height, width), dtype=torch.bool, device=masks.device)
    for plane, mask, box in zip(pasted, masks, boxes.tolist(), strict=True):
        left, top, right, bottom = box
        x0, x1 = max(0, math.floor(left)), min(width, math.ceil(right))
        y0, y1 = max(0, math.floor(top)), min(height, math.ceil(bottom))
        if x0 >= x1 or y0 >= y1 or right <= left or bottom <= top:
            continue
        xs = torch.arange(x0, x1, device=masks.device) + 0.5
        ys = torch.arange(y0, y1, device=masks.device) + 0.5
        # From -1 at the one edge of the box to 1 at the other.
        across = (2 * (xs - left) / (right - left) - 1).expand(len(ys), -1)
        down = (2 * (ys - top) / (bottom - top) - 1)[:, None].expand(-1, len(xs))
        grid = torch.stack((across, down), -1)
        values = F.grid_sample(mask[None, None].float(), grid[None].float(), align_corners=False)
        plane[y0:y1, x0:x1] = values[0, 0] >= threshold
    return pasted
