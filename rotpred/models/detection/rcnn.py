"""Two-stage detectors on a backbone: Faster R-CNN C4, Mask R-CNN with FPN.

Nothing is frozen, not even batch norm of the backbone: the pretrained networks that they evaluate
were never trained on boxes. torchvision's resizing and normalising is omitted, because the loader
does both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from pipelines.dense.batch import Target
from rotpred.models.base import Backbone
from rotpred.models.detection.fpn import LEVELS, Pyramid, stride
from rotpred.models.detection.masks import MaskPredictor
from rotpred.models.detection.roi_heads import BoxPredictor, Detections, Heads, Pooler
from rotpred.models.detection.rpn import Rpn
from rotpred.models.detection.settings import C4, FPN, BoxHead, Proposals
from rotpred.models.resnet import ResNet


class Rcnn(nn.Module):
    """Base class: backbone, proposals and heads. Keys of backbone weights begin with `backbone.`"""

    backbone: ResNet
    rpn: Rpn
    heads: Heads

    def feature_maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the feature maps (B, C, h, w) for proposals and heads, by name."""
        raise NotImplementedError

    @property
    def shared(self) -> nn.Module | None:
        """The stage of the backbone that is applied to proposals, if there is one."""
        return None

    def forward(
        self,
        images: torch.Tensor,
        sizes: Sequence[Sequence[int]],
        targets: list[Target] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, torch.Tensor] | list[Detections]:
        """Return losses by name in training, else the detections in each image.

        Args:
            images: float (B, 3, H, W), normalised; each image at the top left, padded with 0.
            sizes: Height and width of each image, to which boxes are clipped. Not a tensor: data
                parallelism would move it to the GPU, and reading it would wait for queued work.
            targets: Ground truth, in training.
            seeds: One per image, for sampling anchors and proposals. None: torch's global state.

        Raises:
            ValueError: There are no targets in training.
        """
        if self.training and targets is None:
            raise ValueError("targets are needed in training mode")
        for part in (self.rpn, self.heads):
            part.fg_bg_sampler.seeds = seeds
        features = self.feature_maps(images)
        shapes = [(height, width) for height, width in sizes]
        boxes, losses = self.rpn(ImageList(images, shapes), features, targets)
        detections: list[Detections]
        detections, head_losses = self.heads(features, boxes, shapes, targets, shared=self.shared)
        if not self.training:
            return detections
        return {
            "rpn_cls": losses["loss_objectness"],
            "rpn_box": losses["loss_rpn_box_reg"],
            **head_losses,
        }


class FasterRcnnC4(Rcnn):
    """Proposals on res4; res5 and an extra batch norm are applied to each of them."""

    def __init__(self, backbone: ResNet, classes: int, proposals: Proposals) -> None:
        super().__init__()
        self.backbone = backbone
        res4_stride = 4 * stride(backbone)
        channels, top = backbone.stage_channels[3:]
        self.rpn = Rpn(channels, (proposals.anchors,), (res4_stride,), proposals)
        # As in the sources, no ReLU follows the extra norm.
        head = nn.Sequential(nn.BatchNorm2d(top), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        pool = Pooler(proposals.pooled, {"res4": res4_stride})
        self.heads = Heads(pool, head, BoxPredictor(top, classes), rois=proposals.rois)

    @property
    def shared(self) -> nn.Module:
        """The backbone's res5."""
        return self.backbone.layer4

    def feature_maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the feature map of res4, (B, C, h, w), at 4 times the stride of res2."""
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
                f"a pyramid has {len(LEVELS)} feature maps, each with one anchor size: "
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

    def feature_maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return P2 to P6, each (B, 256, h, w); see `Pyramid`."""
        features: dict[str, torch.Tensor] = self.pyramid(self.backbone.stages(images)[1:])
        return features


def faster_rcnn_c4(backbone: Backbone, classes: int, proposals: Proposals = C4) -> Rcnn:
    """Build Faster R-CNN on res4 (stride 16 with the usual stem), with res5 in the head.

    As in mmselfsup's faster-rcnn_r50-c4_ms-24k_voc0712.py and MoCo's pascal_voc_R_50_C4_24k.yaml
    (`ResLayerExtraNorm`, `Res5ROIHeadsExtraNorm`): an RPN convolution of res4's width, RoIAlign to
    14x14, res5 (to 7x7), one extra norm, global average, one box per class.

    Args:
        backbone: A ResNet; its weights are part of the detector.
        classes: Number of classes without the background.
        proposals: Anchors and numbers of proposals.

    Raises:
        ValueError: The backbone is not a ResNet.
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
    """Build Mask R-CNN with FPN.

    Args:
        backbone: A ResNet; its weights are part of the detector.
        classes: Number of classes without the background.
        proposals: Anchors (one size for each of P2 to P6) and numbers of proposals.
        box_head: 4conv1fc: four convolutions and one layer of 1024, batch norm in box and mask head
            (mmselfsup, mask-rcnn_r50_fpn_ms-1x_coco.py). 2fc: two layers of 1024, no norm in the
            heads (detectron2, coco_R_50_FPN_1x_moco.yaml).
        masks: False for data without object masks: Faster R-CNN.

    Raises:
        ValueError: The backbone is not a ResNet, or there is not one anchor size per feature map.
    """
    return MaskRcnnFpn(_resnet(backbone), classes, proposals, box_head, masks)


def _resnet(backbone: Backbone) -> ResNet:
    if not isinstance(backbone, ResNet):
        raise ValueError(f"detectors need a ResNet backbone, got {backbone.arch}")
    return backbone
