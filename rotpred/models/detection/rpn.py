"""Region proposals: torchvision's network with the anchors, losses and chance of the protocols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

RATIOS = (0.5, 1.0, 2.0)
"""Height to width of anchors."""


@dataclass(frozen=True)
class Proposals:
    """Where a detector looks. Pairs are for training and for evaluation."""

    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Sides in pixels: all of them at every place of the one map, or one for each map."""
    before: tuple[int, int] = (12000, 6000)
    """Best boxes of each map that go into the suppression of overlaps."""
    after: tuple[int, int] = (2000, 1000)
    """Best boxes of an image that come out of it."""
    rois: int = 512
    """Of these, how many the box head is trained on, per image."""
    pooled: int = 14
    """Side of the map that becomes of a proposal before res5, or before the mask head; half of it
    before the box head of a pyramid. Masks are twice as fine."""

    def __post_init__(self) -> None:
        if not self.anchors or min(self.anchors) < 1:
            raise ValueError(f"proposals.anchors must be positive sides, got {self.anchors}")
        if min(*self.before, *self.after, self.rois) < 1:
            raise ValueError(
                "proposals.before, after and rois must be at least 1, got "
                f"{self.before}, {self.after} and {self.rois}"
            )
        if self.pooled < 2 or self.pooled % 2:
            raise ValueError(f"proposals.pooled must be even, at least 2, got {self.pooled}")


class Draws(BalancedPositiveNegativeSampler):  # type: ignore[misc]  # torchvision is untyped
    """A random choice of positives and negatives that depends on the images' seeds alone.

    Neither what was drawn before nor the number of processes matters, so a run that goes on from a
    checkpoint draws as if it had never stopped.
    """

    def __init__(self, count: int, positive: float) -> None:
        """Choose up to `count` of each image, up to the share `positive` of it positives."""
        super().__init__(count, positive)
        self.seeds: Sequence[int] | None = None
        """One for each image of the coming batch; None: torch's own state decides."""

    def __call__(
        self, matched: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Masks of the chosen positives (label above 0) and negatives (label 0), per image."""
        chosen: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for i, labels in enumerate(matched):
            generator = None
            if self.seeds is not None:
                generator = torch.Generator(labels.device).manual_seed(self.seeds[i])
            most = int(self.batch_size_per_image * self.positive_fraction)
            for masks, wanted in zip(chosen, (labels >= 1, labels == 0), strict=True):
                places = torch.where(wanted)[0]
                order = torch.randperm(len(places), generator=generator, device=labels.device)
                mask = torch.zeros_like(labels, dtype=torch.uint8)
                mask[places[order[:most]]] = 1
                masks.append(mask)
                most = self.batch_size_per_image - min(most, len(places))
        return chosen


class Anchors(AnchorGenerator):  # type: ignore[misc]  # torchvision is untyped
    """Anchors as detectron2 and mmdetection place them.

    Sides are not rounded, and the strides are the network's own: torchvision divides the image's
    side by the map's, which is too little where a map was rounded up.
    """

    def __init__(self, sizes: tuple[tuple[int, ...], ...], strides: tuple[int, ...]) -> None:
        """Sides of the anchors and stride in pixels, of each map."""
        super().__init__(sizes, (RATIOS,) * len(sizes))
        self.strides = strides

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Boxes (len(ratios) * len(scales), 4) around the origin."""
        sides = torch.tensor(scales, dtype=dtype, device=device)[None]
        root = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        widths, heights = (sides / root).flatten(), (sides * root).flatten()
        return torch.stack((-widths, -heights, widths, heights), 1) / 2

    def forward(self, images: ImageList, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """The anchors of all maps, float32 (A, 4), the same for each image."""
        device = maps[0].device
        self.set_cell_anchors(torch.float32, device)
        # Numbers, where torchvision has tensors: those would be copied to the GPU, and waited for.
        steps = [[stride] * 2 for stride in self.strides]
        grids = self.grid_anchors([list(m.shape[-2:]) for m in maps], steps)
        return [torch.cat(grids)] * len(images.image_sizes)


class Head(RPNHead):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's head (3x3 convolution, ReLU; normal 0.01), its predictions in float32."""

    def forward(self, maps: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Objectness (B, A, h, w) and box deltas (B, 4 A, h, w) of each map."""
        logits, deltas = [], []
        for features in maps:
            hidden = self.conv(features)
            # Otherwise bf16 scores of ten thousand anchors tie, and boxes lose their pixels.
            with torch.autocast(hidden.device.type, enabled=False):
                logits.append(self.cls_logits(hidden.float()))
                deltas.append(self.bbox_pred(hidden.float()))
        return logits, deltas


class Rpn(RegionProposalNetwork):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's network with L1 in place of smooth L1.

    Positives from an overlap of 0.7 on (and the best anchor of every box), negatives below 0.3, 256
    anchors of each image, half of them positive; suppression at 0.7 (Ren et al. 2015; the common
    values of detectron2's config/defaults.py and mmdetection's faster-rcnn models).
    """

    def __init__(
        self, channels: int, sizes: tuple[tuple[int, ...], ...], strides: tuple[int, ...],
        proposals: Proposals,
    ) -> None:  # fmt: skip
        """Look at maps of so many channels, with anchors of such sides at such strides."""
        per_place = {len(sides) * len(RATIOS) for sides in sizes}
        if len(per_place) > 1:
            raise ValueError(f"every map needs as many anchors as the others, got {sizes}")
        super().__init__(
            Anchors(sizes, strides),
            Head(channels, per_place.pop()),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=dict(zip(("training", "testing"), proposals.before, strict=True)),
            post_nms_top_n=dict(zip(("training", "testing"), proposals.after, strict=True)),
            nms_thresh=0.7,
        )
        self.fg_bg_sampler = Draws(256, 0.5)

    def compute_loss(
        self,
        objectness: torch.Tensor,
        pred_bbox_deltas: torch.Tensor,
        labels: list[torch.Tensor],
        regression_targets: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy of the chosen anchors, and L1 of the positive ones over their number.

        The number is that of all chosen ones: 256 for each image that has so many.
        """
        positive, negative = (
            torch.where(torch.cat(masks))[0] for masks in self.fg_bg_sampler(labels)
        )
        chosen = torch.cat((positive, negative))
        truth = torch.cat(regression_targets)[positive]
        boxes = F.l1_loss(pred_bbox_deltas[positive], truth, reduction="sum") / len(chosen)
        scores = F.binary_cross_entropy_with_logits(
            objectness.flatten()[chosen], torch.cat(labels)[chosen]
        )
        return scores, boxes
