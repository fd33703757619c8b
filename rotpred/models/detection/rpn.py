"""Region proposal network: torchvision's, with the protocols' anchors, losses and sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from rotpred.models.detection.settings import Proposals

RATIOS = (0.5, 1.0, 2.0)
"""Aspect ratios (height / width) of anchors."""


class SeededSampler(BalancedPositiveNegativeSampler):  # type: ignore[misc]  # torchvision is untyped
    """Random sampler of positives and negatives that depends on the images' seeds alone.

    Samples depend neither on earlier ones nor on the number of processes, so a run that is resumed
    from a checkpoint samples as if it had never stopped.
    """

    def __init__(self, count: int, positive: float) -> None:
        """Sample up to `count` per image, at most the fraction `positive` of them positives."""
        super().__init__(count, positive)
        self.seeds: Sequence[int] | None = None
        """One per image of the next batch. None: use torch's global random state."""

    def __call__(
        self, matched: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Sample from the labels (A,) of each image.

        Returns:
            Masks uint8 (A,) of the sampled positives (label above 0), and of the negatives (label
            0), per image.
        """
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

    Sizes are not rounded, and the strides are those of the network. torchvision divides the side of
    the image by that of the feature map, which is too small if the latter was rounded up.
    """

    def __init__(self, sizes: tuple[tuple[int, ...], ...], strides: tuple[int, ...]) -> None:
        """Take anchor sizes and stride in pixels for each feature map."""
        super().__init__(sizes, (RATIOS,) * len(sizes))
        self.strides = strides

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Return boxes (len(aspect_ratios) * len(scales), 4) around the origin."""
        sides = torch.tensor(scales, dtype=dtype, device=device)[None]
        root = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        widths, heights = (sides / root).flatten(), (sides * root).flatten()
        return torch.stack((-widths, -heights, widths, heights), 1) / 2

    def forward(self, images: ImageList, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the anchors of all feature maps (B, C, h, w): float32 (A, 4), once per image."""
        device = features[0].device
        self.set_cell_anchors(torch.float32, device)
        # Numbers, not tensors as in torchvision: copying those to the GPU would wait for it.
        steps = [[stride] * 2 for stride in self.strides]
        grids = self.grid_anchors([list(x.shape[-2:]) for x in features], steps)
        return [torch.cat(grids)] * len(images.image_sizes)


class Head(RPNHead):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's head (3x3 convolution, ReLU; N(0, 0.01)) with predictions in float32."""

    def forward(
        self, features: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Map feature maps (B, C, h, w) to objectness (B, A, h, w) and deltas (B, 4 A, h, w)."""
        logits, deltas = [], []
        for x in features:
            hidden = self.conv(x)
            # In bf16, scores of ten thousand anchors would tie, and boxes lose pixel accuracy.
            with torch.autocast(hidden.device.type, enabled=False):
                logits.append(self.cls_logits(hidden.float()))
                deltas.append(self.bbox_pred(hidden.float()))
        return logits, deltas


class Rpn(RegionProposalNetwork):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's RPN with L1 instead of smooth L1.

    Positives have an IoU of at least 0.7 (or are the best anchor of a box), negatives below 0.3.
    256 anchors are sampled per image, half of them positive; NMS at 0.7 (Ren et al. 2015; the
    values common to detectron2's config/defaults.py and mmdetection's faster-rcnn models).
    """

    def __init__(
        self, channels: int, sizes: tuple[tuple[int, ...], ...], strides: tuple[int, ...],
        proposals: Proposals,
    ) -> None:  # fmt: skip
        """Build the RPN.

        Args:
            channels: Channels of every feature map.
            sizes: Anchor sizes in pixels, for each feature map.
            strides: Stride in pixels of each feature map.
            proposals: Numbers of proposals.

        Raises:
            ValueError: The feature maps have different numbers of anchors.
        """
        per_position = {len(sides) * len(RATIOS) for sides in sizes}
        if len(per_position) > 1:
            raise ValueError(f"every feature map needs the same number of anchors, got {sizes}")
        super().__init__(
            Anchors(sizes, strides),
            Head(channels, per_position.pop()),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=dict(zip(("training", "testing"), proposals.before, strict=True)),
            post_nms_top_n=dict(zip(("training", "testing"), proposals.after, strict=True)),
            nms_thresh=0.7,
        )
        self.fg_bg_sampler = SeededSampler(256, 0.5)

    def compute_loss(
        self,
        objectness: torch.Tensor,
        pred_bbox_deltas: torch.Tensor,
        labels: list[torch.Tensor],
        regression_targets: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cross entropy and L1 of the sampled anchors, as two scalars.

        Both are divided by the number of sampled anchors: 256 per image, or fewer if it has fewer.
        L1 counts the positive ones alone. Shapes are those of torchvision.
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
