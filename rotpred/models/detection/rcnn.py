"""Two-stage detectors around a backbone: Faster R-CNN on C4, Mask R-CNN on a pyramid.

Nothing in them is frozen, batch norm of the backbone included: the pretrained networks that they
evaluate were never trained on boxes. torchvision's resizing and normalising is left out, because
the loader has done both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from pipelines.dense.batch import Target
from rotpred.models.base import Backbone
from rotpred.models.detection.fpn import LEVELS, Pyramid, stride
from rotpred.models.detection.roi_heads import (
    BoxPredictor,
    Detections,
    Heads,
    MaskPredictor,
    Pooler,
)
from rotpred.models.detection.rpn import Proposals, Rpn
from rotpred.models.resnet import ResNet

BoxHead = Literal["4conv1fc", "2fc"]


class Rcnn(nn.Module):
    """Backbone, proposals and heads. The names of the backbone's weights begin with `backbone.`"""

    backbone: ResNet
    rpn: Rpn
    heads: Heads

    def maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The maps that proposals and heads read, by name."""
        raise NotImplementedError

    @property
    def shared(self) -> nn.Module | None:
        """The part of the backbone that works on proposals, if there is one."""
        return None

    def forward(
        self,
        images: torch.Tensor,
        sizes: Sequence[Sequence[int]],
        targets: list[Target] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, torch.Tensor] | list[Detections]:
        """Losses by name in training, else what is found in each image.

        Args:
            images: (B, 3, H, W), normalised; each image at the top left, 0 beside it.
            sizes: height and width of each, to which boxes are clipped. No tensor: data parallelism
                would move it to the GPU, and to read it would wait for all that is queued there.
            targets: the truth, in training.
            seeds: of the random choice of anchors and proposals, for each image; None: torch's.
        """
        if self.training and targets is None:
            raise ValueError("targets are needed in training mode")
        for part in (self.rpn, self.heads):
            part.fg_bg_sampler.seeds = seeds
        maps = self.maps(images)
        shapes = [(height, width) for height, width in sizes]
        boxes, losses = self.rpn(ImageList(images, shapes), maps, targets)
        found: list[Detections]
        found, more = self.heads(maps, boxes, shapes, targets, shared=self.shared)
        if not self.training:
            return found
        return {
            "rpn_cls": losses["loss_objectness"],
            "rpn_box": losses["loss_rpn_box_reg"],
            **more,
        }


class FasterRcnnC4(Rcnn):
    """Proposals on res4; res5 works on each of them, followed by one more norm."""

    def __init__(self, backbone: ResNet, classes: int, proposals: Proposals) -> None:
        super().__init__()
        self.backbone = backbone
        pace = 4 * stride(backbone)
        channels, top = backbone.stage_channels[3:]
        self.rpn = Rpn(channels, (proposals.anchors,), (pace,), proposals)
        # The norm has no ReLU behind it, there as here.
        head = nn.Sequential(nn.BatchNorm2d(top), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        pool = Pooler(proposals.pooled, {"res4": pace})
        self.heads = Heads(pool, head, BoxPredictor(top, classes), rois=proposals.rois)

    @property
    def shared(self) -> nn.Module:
        """The backbone's res5."""
        return self.backbone.layer4

    def maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The map of res4."""
        body = self.backbone
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        return {"res4": body.layer3(body.layer2(body.layer1(x)))}


class MaskRcnnFpn(Rcnn):
    """Proposals on P2 to P6, boxes and masks on P2 to P5."""

    def __init__(
        self, backbone: ResNet, classes: int, proposals: Proposals, box_head: BoxHead, masks: bool
    ) -> None:
        super().__init__()
        if len(proposals.anchors) != len(LEVELS):
            raise ValueError(
                f"a pyramid has {len(LEVELS)} maps, each with a side of anchors: "
                f"proposals.anchors are {proposals.anchors}"
            )
        self.backbone = backbone
        self.pyramid = Pyramid(backbone)
        strides, width = self.pyramid.strides, self.pyramid.channels
        self.rpn = Rpn(width, tuple((side,) for side in proposals.anchors), strides, proposals)
        pooled = dict(zip(LEVELS[:4], strides, strict=False))
        side = proposals.pooled // 2
        norm = nn.BatchNorm2d if box_head == "4conv1fc" else None
        head: nn.Module
        if box_head == "4conv1fc":
            head = FastRCNNConvFCHead((width, side, side), [width] * 4, [1024], norm_layer=norm)
        else:
            head = TwoMLPHead(width * side * side, 1024)
        for layer in head.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, a=1)
                nn.init.zeros_(layer.bias)
        self.heads = Heads(
            Pooler(side, pooled),
            head,
            BoxPredictor(1024, classes),
            rois=proposals.rois,
            mask_pool=Pooler(2 * side, pooled) if masks else None,
            mask_head=MaskRCNNHeads(width, [width] * 4, 1, norm_layer=norm) if masks else None,
            mask_predictor=MaskPredictor(width, classes) if masks else None,
        )

    def maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The maps of the pyramid."""
        maps: dict[str, torch.Tensor] = self.pyramid(self.backbone.stages(images)[1:])
        return maps


C4 = Proposals()
FPN = Proposals(before=(2000, 1000), after=(1000, 1000))


def faster_rcnn_c4(backbone: Backbone, classes: int, proposals: Proposals = C4) -> Rcnn:
    """Faster R-CNN on the map of res4 (stride 16 with the usual stem), res5 as the shared head.

    As mmselfsup's faster-rcnn_r50-c4_ms-24k_voc0712.py and MoCo's pascal_voc_R_50_C4_24k.yaml
    (`ResLayerExtraNorm`, `Res5ROIHeadsExtraNorm`): a convolution of res4's width before the
    proposals' scores, RoIAlign to 14x14, res5 (to 7x7), one extra norm, global average, a box for
    each class.

    Args:
        backbone: a ResNet; its weights are part of the detector.
        classes: number of classes without the background.
        proposals: anchors and numbers of proposals.

    Raises:
        ValueError: the backbone is no ResNet.
    """
    return FasterRcnnC4(_resnet(backbone), classes, proposals)


def mask_rcnn_fpn(
    backbone: Backbone,
    classes: int,
    proposals: Proposals = FPN,
    *,
    box_head: BoxHead = "4conv1fc",
    masks: bool = True,
) -> Rcnn:
    """Mask R-CNN on a pyramid.

    Args:
        backbone: a ResNet; its weights are part of the detector.
        classes: number of classes without the background.
        proposals: anchors (a side for each of P2 to P6) and numbers of proposals.
        box_head: 4conv1fc: four convolutions and one layer of 1024, batch norm in box and mask head
            (mmselfsup, mask-rcnn_r50_fpn_ms-1x_coco.py); 2fc: two layers of 1024, no norm in the
            heads (detectron2, coco_R_50_FPN_1x_moco.yaml).
        masks: False for data without masks of objects: Faster R-CNN.

    Raises:
        ValueError: the backbone is no ResNet, or the number of anchors is not that of the maps.
    """
    return MaskRcnnFpn(_resnet(backbone), classes, proposals, box_head, masks)


def _resnet(backbone: Backbone) -> ResNet:
    if not isinstance(backbone, ResNet):
        raise ValueError(f"detectors need a ResNet, {backbone.arch} is none")
    return backbone
