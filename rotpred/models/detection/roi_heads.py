"""RoI heads: pooling of proposals, box predictor, losses and detections of a two-stage detector."""

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
from rotpred.models.detection.masks import MaskPredictor, mask_loss, mask_targets
from rotpred.models.detection.rpn import SeededSampler

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""Factors of the box deltas: x, y, log width and log height."""


class Detections(TypedDict, total=False):
    """Detections in an image: K objects, highest score first."""

    boxes: torch.Tensor
    """float32 (K, 4): left, top, right, bottom in pixels of the resized image."""
    labels: torch.Tensor
    """int64 (K,): from 1."""
    scores: torch.Tensor
    """float32 (K,)."""
    masks: torch.Tensor
    """float32 (K, s, s), s usually 28: probabilities within the box. Only with a mask head."""


class Pooler(nn.Module):
    """RoIAlign on one feature map, or on the FPN level that fits the size of a proposal.

    Aligned: a value of the feature map belongs to the centre of its pixels, half a pixel off from
    torchvision's own pooler (detectron2: ROIAlignV2). The number of samples adapts to the size of a
    bin (sampling ratio 0).
    """

    def __init__(self, size: int, strides: dict[str, int]) -> None:
        """Pool to (size, size). `strides` is the stride in pixels of each feature map by name."""
        super().__init__()
        self.size, self.strides = size, strides
        levels = [int(math.log2(stride)) for stride in strides.values()]
        # A proposal of 224 pixels belongs to the level of stride 16 (Lin et al. 2017, equation 1).
        self._level = LevelMapper(levels[0], levels[-1])

    def forward(self, features: dict[str, torch.Tensor], boxes: list[torch.Tensor]) -> torch.Tensor:
        """Pool the boxes (K, 4) of every image to (sum of K, C, size, size).

        `features` are feature maps (B, C, h, w) by name.
        """
        which = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rois = torch.cat((which, torch.cat(boxes)), 1)
        if len(self.strides) == 1:
            ((name, stride),) = self.strides.items()
            return self._align(features[name], rois, stride)
        levels = self._level(boxes)
        parts = [torch.where(levels == k)[0] for k in range(len(self.strides))]
        pooled = torch.cat(
            [
                self._align(features[name], rois[part], stride)
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
    """Predicts scores of the background and C classes, and one box per class, in float32."""

    def __init__(self, channels: int, classes: int) -> None:
        """Initialise with N(0, 0.01) and N(0, 0.001), as detectron2 and mmdetection do."""
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


class Heads(RoIHeads):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's RoI heads with L1, a box for each class but the background, and aligned masks.

    Training samples 512 proposals per image, ground-truth boxes among them; a quarter is positive
    (IoU of at least 0.5). Evaluation keeps scores above 0.05, applies NMS per class at 0.5, and
    returns the best 100 (detectron2, config/defaults.py; mmdetection, faster-rcnn models).
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
        """Combine the parts. Masks are predicted if the three mask parts are given.

        Args:
            pool: Pools the proposals.
            box_head: Maps pooled features to vectors.
            predictor: Maps vectors to scores and boxes.
            rois: Proposals per image in training.
            mask_pool: Pools the proposals for masks.
            mask_head: Maps pooled features to features of the same size.
            mask_predictor: Maps these features to masks.
        """
        super().__init__(
            pool, box_head, predictor,
            fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=rois,
            positive_fraction=0.25, bbox_reg_weights=BOX_WEIGHTS,
            score_thresh=0.05, nms_thresh=0.5, detections_per_img=100,
            mask_roi_pool=mask_pool, mask_head=mask_head, mask_predictor=mask_predictor,
        )  # fmt: skip
        self.fg_bg_sampler = SeededSampler(rois, 0.25)

    def forward(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        sizes: list[tuple[int, int]],
        targets: list[Target] | None = None,
        *,
        shared: nn.Module | None = None,
    ) -> tuple[list[Detections], dict[str, torch.Tensor]]:
        """Return the detections of each image in evaluation, and the losses in training.

        Args:
            features: Feature maps (B, C, h, w) of the whole batch, by name.
            proposals: float32 (P, 4) of each image.
            sizes: Height and width of each image, without padding.
            targets: Ground truth, in training.
            shared: Applied to the pooled features first; part of the backbone, not of the heads.
        """
        if self.training:
            proposals, matched, labels, truth = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals)
        logits, deltas = self.box_predictor(
            self.box_head(pooled if shared is None else shared(pooled))
        )
        if not self.training:
            return self._detect(features, logits, deltas, proposals, sizes), {}
        losses = box_losses(logits, deltas, torch.cat(labels), torch.cat(truth))
        if self.has_mask():
            assert targets is not None
            positive = [torch.where(part > 0)[0] for part in labels]
            boxes = [part[keep] for part, keep in zip(proposals, positive, strict=True)]
            classes = torch.cat([part[keep] for part, keep in zip(labels, positive, strict=True)])
            mask_truth = [
                mask_targets(target["masks"], box, which[keep], 2 * self.mask_roi_pool.size)
                for target, box, which, keep in zip(targets, boxes, matched, positive, strict=True)
            ]
            predicted = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes)))
            losses["mask"] = mask_loss(predicted, classes, torch.cat(mask_truth))
        return [], losses

    def _detect(
        self,
        features: dict[str, torch.Tensor],
        logits: torch.Tensor,
        deltas: torch.Tensor,
        proposals: list[torch.Tensor],
        sizes: list[tuple[int, int]],
    ) -> list[Detections]:
        # torchvision also expects a box for the background, which it then drops.
        with_background = F.pad(deltas, (0, 0, 1, 0)).flatten(1)
        boxes, scores, labels = self.postprocess_detections(
            logits, with_background, proposals, sizes
        )
        detections: list[Detections] = [
            {"boxes": box, "labels": label, "scores": score}
            for box, label, score in zip(boxes, labels, scores, strict=True)
        ]
        if self.has_mask():
            features_of_boxes = self.mask_head(self.mask_roi_pool(features, boxes))
            masks = self.mask_predictor(features_of_boxes).sigmoid()
            masks = masks[torch.arange(len(masks), device=masks.device), torch.cat(labels) - 1]
            for one, part in zip(detections, masks.split([len(box) for box in boxes]), strict=True):
                one["masks"] = part
        return detections


def box_losses(
    logits: torch.Tensor, deltas: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the losses of the box head as scalars, "cls" and "box".

    "cls" is the mean cross entropy of R proposals. "box" is L1 over the positive proposals, for the
    box of the true class, divided by R.

    Args:
        logits: (R, 1 + C).
        deltas: (R, C, 4).
        labels: int64 (R,), 0 for the background.
        truth: (R, 4), true deltas.
    """
    positive = torch.where(labels > 0)[0]
    predicted = deltas[positive, labels[positive] - 1]
    return {
        "cls": F.cross_entropy(logits, labels),
        "box": F.l1_loss(predicted, truth[positive], reduction="sum") / max(1, len(labels)),
    }
