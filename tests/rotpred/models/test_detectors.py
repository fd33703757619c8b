"""Detectors: published settings, anchors, sampling, training, inference."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList

from pipelines.dense.batch import Target
from rotpred.models.backbone import build_backbone
from rotpred.models.detection.rcnn import Rcnn, faster_rcnn_c4, mask_rcnn_fpn
from rotpred.models.detection.rpn import Anchors, Rpn, SeededSampler
from rotpred.models.detection.settings import FPN, Proposals
from rotpred.training.optim import param_groups

FEW = Proposals(anchors=(16, 32), before=(60, 40), after=(30, 20), rois=12)
FEW_FPN = Proposals(anchors=(8, 16, 32, 64, 128), before=(60, 40), after=(30, 20), rois=8, pooled=8)
SIZES = [[64, 48], [50, 64]]


def truth() -> list[Target]:
    """Three objects in two images of SIZES."""
    targets: list[Target] = [
        {"boxes": torch.tensor([[4.0, 4, 30, 40]]), "labels": torch.tensor([1])},
        {
            "boxes": torch.tensor([[10.0, 4, 50, 40], [0, 0, 20, 20]]),
            "labels": torch.tensor([3, 1]),
        },
    ]
    for target, (height, width) in zip(targets, SIZES, strict=True):
        masks = torch.zeros(len(target["boxes"]), height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, target["boxes"].int(), strict=True):
            mask[top:bottom, left:right] = 1
        target["masks"] = masks
    return targets


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


R50 = 23_508_032
"""Weights of ResNet-50 without its classifier."""


def test_the_numbers_of_faster_rcnn_c4() -> None:
    """docs/protocols.md, Detection; parameter counts by hand."""
    with torch.device("meta"):
        model = faster_rcnn_c4(build_backbone("resnet50"), 20)
    rpn, heads = model.rpn, model.heads
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["rpn.head.conv.0.0.weight"] == (1024, 1024, 3, 3)
    assert shapes["rpn.head.cls_logits.weight"] == (15, 1024, 1, 1)
    assert shapes["rpn.head.bbox_pred.weight"] == (60, 1024, 1, 1)
    assert shapes["heads.box_head.0.weight"] == (2048,)
    assert shapes["heads.box_predictor.scores.weight"] == (21, 2048)
    assert shapes["heads.box_predictor.deltas.weight"] == (80, 2048)
    head = 1024 * 1024 * 9 + 1024 + 75 * 1025 + 2 * 2048 + 101 * 2049
    assert numbers(model) == R50 + head
    assert rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),)
    assert rpn.anchor_generator.strides == (16,)
    assert rpn._pre_nms_top_n == {"training": 12000, "testing": 6000}
    assert rpn._post_nms_top_n == {"training": 2000, "testing": 1000}
    assert (heads.box_roi_pool.size, heads.box_roi_pool.strides) == (14, {"res4": 16})
    _common(model)


@pytest.mark.parametrize(("box_head", "norms"), [("4conv1fc", 53 + 8 + 4 + 4), ("2fc", 53 + 8)])
def test_the_numbers_of_mask_rcnn_fpn(box_head: str, norms: int) -> None:
    """docs/protocols.md, Detection; parameter counts by hand."""
    with torch.device("meta"):
        model = mask_rcnn_fpn(build_backbone("resnet50"), 80, box_head=box_head)  # type: ignore[arg-type]
    rpn, heads, conv = model.rpn, model.heads, 256 * 256 * 9
    lateral = sum(width * 256 for width in (256, 512, 1024, 2048))
    pyramid = lateral + 4 * conv + 8 * 512
    proposing = conv + 256 + 15 * 257
    first = 256 * 49 * 1024 + 1024
    if box_head == "4conv1fc":
        boxes, masks = 4 * (conv + 512) + first, 4 * (conv + 512)
    else:
        boxes, masks = first + 1024 * 1025, 4 * (conv + 256)
    last = 81 * 1025 + 320 * 1025 + (256 * 256 * 4 + 256) + 80 * 257
    assert numbers(model) == R50 + pyramid + proposing + boxes + masks + last
    assert rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert rpn.anchor_generator.strides == (4, 8, 16, 32, 64)
    assert rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}
    assert rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    assert (heads.box_roi_pool.size, heads.mask_roi_pool.size) == (7, 14)
    assert list(heads.mask_roi_pool.strides.values()) == [4, 8, 16, 32]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == norms
    _common(model)


def _common(model: Rcnn) -> None:
    rpn, heads = model.rpn, model.heads
    assert (rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold) == (0.7, 0.3)
    assert rpn.proposal_matcher.allow_low_quality_matches and rpn.nms_thresh == 0.7
    draws = rpn.fg_bg_sampler
    assert (draws.batch_size_per_image, draws.positive_fraction) == (256, 0.5)
    draws = heads.fg_bg_sampler
    assert (draws.batch_size_per_image, draws.positive_fraction) == (512, 0.25)
    matcher = heads.proposal_matcher
    assert (matcher.high_threshold, matcher.low_threshold) == (0.5, 0.5)
    assert not matcher.allow_low_quality_matches
    assert heads.box_coder.weights == (10, 10, 5, 5) and rpn.box_coder.weights == (1, 1, 1, 1)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.rpn.modules())


def test_how_fresh_layers_start() -> None:
    torch.manual_seed(0)
    model = mask_rcnn_fpn(build_backbone("resnet18"), 80)
    for name, spread in (
        ("rpn.head.conv.0.0", 0.01), ("rpn.head.cls_logits", 0.01), ("rpn.head.bbox_pred", 0.01),
        ("heads.box_predictor.scores", 0.01), ("heads.box_predictor.deltas", 0.001),
        ("heads.mask_head.0.0", math.sqrt(2 / (256 * 9))),
        ("pyramid.fpn.inner_blocks.0.0", math.sqrt(1 / 64)),
    ):  # fmt: skip
        layer = model.get_submodule(name)
        weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
        assert float(weight.detach().std()) == pytest.approx(spread, rel=0.08), name
        assert bias is None or not bias.any(), name


def test_what_decays() -> None:
    """detectron2 exempts exactly the norms, mmdetection nothing."""
    model = faster_rcnn_c4(build_backbone("resnet18"), 3)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    groups = param_groups(model, rule="no_norm", weight_decay=1e-4)
    spared = [p for group in groups if group["weight_decay"] == 0 for p in group["params"]]  # type: ignore[attr-defined]
    assert len(spared) == 2 * len(norms) == 2 * 21
    groups = param_groups(model, rule="all", weight_decay=1e-4)
    assert all(group["weight_decay"] == 1e-4 for group in groups)


def test_the_backbone_lands_in_the_detector_bit_for_bit() -> None:
    backbone = build_backbone("resnet18")
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    for model in (faster_rcnn_c4(backbone, 3, FEW), mask_rcnn_fpn(backbone, 3)):
        state = model.state_dict()
        assert all(torch.equal(state[f"backbone.{name}"], t) for name, t in before.items())
        assert sum(name.startswith("backbone.") for name in state) == len(before)


@pytest.mark.parametrize("stride", [4, 16, 64])
def test_anchors_lie_where_a_loop_puts_them(stride: int) -> None:
    """At every position of the feature map, starting at the corner, unrounded, row by row."""
    sizes, rows, columns = (32, 64), 2, 3
    made = Anchors((sizes,), (stride,))
    # The image has fewer rows than the feature map times the stride, as with a P5 of odd height.
    images = ImageList(torch.zeros(1, 3, stride * rows - stride // 2, stride * columns), [(9, 9)])
    (found,) = made(images, [torch.zeros(1, 8, rows, columns)])
    expected = []
    for y, x in itertools.product(range(rows), range(columns)):
        for ratio, size in itertools.product((0.5, 1, 2), sizes):
            height = math.sqrt(size * size * ratio)
            width = size * size / height
            corner = (x * stride - width / 2, y * stride - height / 2)
            expected.append([*corner, corner[0] + width, corner[1] + height])
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-4)
    assert made.num_anchors_per_location() == [6]


def test_losses_of_the_proposals_by_hand() -> None:
    """Cross-entropy and L1 over all sampled anchors; ignored anchors do not count."""
    rpn = Rpn(8, ((16,),), (8,), FEW)
    draw = torch.Generator().manual_seed(0)
    logits, deltas, goals = (torch.randn(2 * 10, n, generator=draw) for n in (1, 4, 4))
    labels = torch.tensor([1.0, 0, -1, 0, 1, 0, 0, -1, 0, 0] + [0.0] * 9 + [1])
    scores, boxes = rpn.compute_loss(logits, deltas, list(labels.split(10)), list(goals.split(10)))
    entropy, distance, count = 0.0, 0.0, 0
    for logit, label, delta, goal in zip(logits, labels, deltas, goals, strict=True):
        if label < 0:
            continue
        p = 1 / (1 + math.exp(-float(logit)))
        entropy -= math.log(p if label else 1 - p)
        distance += sum(abs(float(a - b)) for a, b in zip(delta, goal, strict=True)) * float(label)
        count += 1
    assert count == 18
    assert float(scores) == pytest.approx(entropy / count, rel=1e-5)
    assert float(boxes) == pytest.approx(distance / count, rel=1e-5)


def test_the_choice_is_a_function_of_the_seed() -> None:
    """The requested numbers; independent of the other images and of torch's random state."""
    labels = torch.cat((torch.ones(40), torch.zeros(100), -torch.ones(20)))[torch.randperm(160)]
    few = torch.tensor([1.0, 0, 0, -1])
    draws = SeededSampler(64, 0.25)
    draws.seeds = [5, 6]
    positive, negative = draws([labels, few])
    assert (int(positive[0].sum()), int(negative[0].sum())) == (16, 48)
    assert (positive[0] & (labels < 1)).sum() == 0 == (negative[0] & (labels != 0)).sum()
    assert (positive[1].tolist(), negative[1].tolist()) == ([1, 0, 0, 0], [0, 1, 1, 0])
    draws.seeds = [6, 5]
    again = draws([few, labels])
    assert torch.equal(again[0][1], positive[0]) and torch.equal(again[1][1], negative[0])
    draws.seeds = [7]
    assert not torch.equal(draws([labels])[1][0], negative[0])
    draws.seeds = None
    assert not torch.equal(draws([labels])[1][0], draws([labels])[1][0])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet18", "c4"),
        ("resnet18_small", "c4"),
        ("resnet18", "fpn"),
        ("resnet18_small", "2fc"),
    ],
)
def test_training_reaches_every_weight(name: str, kind: str) -> None:
    """Finite losses by name, gradients everywhere; the same seeds, the same losses."""
    torch.manual_seed(0)
    backbone = build_backbone(name)
    if kind == "c4":
        model = faster_rcnn_c4(backbone, 3, FEW)
        assert model.rpn.anchor_generator.strides == ((16,) if name == "resnet18" else (8,))
    else:
        head = "2fc" if kind == "2fc" else "4conv1fc"
        model = mask_rcnn_fpn(backbone, 3, FEW_FPN, box_head=head)  # type: ignore[arg-type]
    images = torch.randn(2, 3, 64, 64)
    losses = model(images, SIZES, truth(), [1, 2])
    names = {"rpn_cls", "rpn_box", "cls", "box"} | ({"mask"} if kind != "c4" else set())
    assert losses.keys() == names
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    untouched = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not untouched
    torch.rand(7)
    again = model(images, SIZES, truth(), [1, 2])
    assert all(torch.equal(again[n], loss) for n, loss in losses.items())
    other = model(images, SIZES, truth(), [3, 4])
    assert not torch.equal(other["cls"], losses["cls"])


@pytest.mark.parametrize("kind", ["fpn", "c4 in bf16"])
def test_detections_lie_in_the_image_and_are_float32(kind: str) -> None:
    torch.manual_seed(0)
    few = replace(FEW_FPN if kind == "fpn" else FEW, after=(30, 3))
    build = mask_rcnn_fpn if kind == "fpn" else faster_rcnn_c4
    model = build(build_backbone("resnet18"), 3, few).eval()
    images = torch.randn(2, 3, 64, 64)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled="bf16" in kind)
    with torch.no_grad(), mixed:
        found = model(images, SIZES)
    for one, (height, width) in zip(found, SIZES, strict=True):
        boxes = one["boxes"]
        assert 0 < len(boxes) <= 9 and boxes.dtype == one["scores"].dtype == torch.float32
        assert boxes.min() >= 0 and boxes[:, 2].max() <= width and boxes[:, 3].max() <= height
        assert (one["scores"][:-1] >= one["scores"][1:]).all() and one["scores"].min() > 0.05
        assert set(one["labels"].tolist()) <= {1, 2, 3}
        if kind == "fpn":
            assert one["masks"].shape == (len(boxes), 16, 16)
            assert one["masks"].min() >= 0 and one["masks"].max() <= 1


def test_an_image_without_objects_has_losses() -> None:
    model = mask_rcnn_fpn(build_backbone("resnet18"), 3, FEW_FPN)
    nothing: Target = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 48, dtype=torch.uint8),
    }
    for targets in ([nothing, truth()[1]], [nothing, nothing]):
        losses = model(torch.randn(2, 3, 64, 64), SIZES, targets)
        assert all(loss.isfinite() for loss in losses.values())
    assert losses["box"] == losses["mask"] == losses["rpn_box"] == 0 < losses["cls"]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="need a ResNet"):
        faster_rcnn_c4(build_backbone("nin3"), 3)
    with pytest.raises(ValueError, match=r"5 feature maps.*\(8, 16\)"):
        mask_rcnn_fpn(build_backbone("resnet18"), 3, Proposals(anchors=(8, 16)))
    with pytest.raises(ValueError, match="anchors"):
        Proposals(anchors=())
    with pytest.raises(ValueError, match="at least 1"):
        Proposals(rois=0)
    with pytest.raises(ValueError, match="even"):
        Proposals(pooled=7)
    with pytest.raises(ValueError, match="targets"):
        faster_rcnn_c4(build_backbone("resnet18"), 3, FEW)(torch.zeros(1, 3, 64, 64), SIZES)
    assert FPN.anchors == (32, 64, 128, 256, 512)
