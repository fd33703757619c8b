"""The segmentation network: dilation, heads, sizes, initial values, loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from pipelines.datasets.annotations import IGNORED
from rotpred.models.backbone import build_backbone
from rotpred.models.fcn import Fcn, FcnHead, dilate, pixel_loss, resize_logits
from rotpred.models.resnet import ResNet
from rotpred.training.optim import param_groups

pytestmark = pytest.mark.timeout(60)


def convolutions(stage: nn.Module) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(dilation, padding) of each 3x3 convolution of a stage, in order."""
    return [
        (conv.dilation, conv.padding)  # type: ignore[misc]  # a string only for padding="same"
        for conv in stage.modules()
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)
    ]


def test_dilation_is_torchvisions() -> None:
    """ResNet-50, equal weights: equal feature maps, and the rates of the contracted first block."""
    torch.manual_seed(0)
    ours = dilate(build_backbone("resnet50")).eval()
    theirs = torchvision.models.resnet50(
        weights=None, replace_stride_with_dilation=[False, True, True]
    ).eval()
    found = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert sorted(found.missing_keys) == ["fc.bias", "fc.weight"] and not found.unexpected_keys
    x = torch.randn(1, 3, 65, 48)
    with torch.no_grad():
        *_, res3, res4, res5 = ours.stages(x)
        expected = theirs.layer2(
            theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x)))))
        )
        torch.testing.assert_close(res3, expected, rtol=0, atol=0)
        expected = theirs.layer3(expected)
        torch.testing.assert_close(res4, expected, rtol=0, atol=0)
        torch.testing.assert_close(res5, theirs.layer4(expected), rtol=0, atol=0)
    assert res4.shape == (1, 1024, 9, 6) and res5.shape == (1, 2048, 9, 6)
    rates = [[rate for (rate, _), _ in convolutions(s)] for s in (ours.layer3, ours.layer4)]
    assert rates == [[1, 2, 2, 2, 2, 2], [2, 4, 4]]
    strides = [stage[0].conv2.stride for stage in (ours.layer1, ours.layer2)]  # type: ignore[index]
    assert strides == [(1, 1), (2, 2)]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_fourth_value_is_the_strided_networks(name: str) -> None:
    torch.manual_seed(1)
    backbone = build_backbone(name).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        strided = backbone.stages(x)
        dilated = dilate(backbone).stages(x)
    assert dilated[4].shape[2:] == dilated[2].shape[2:] == (8, 12)
    torch.testing.assert_close(dilated[3][..., ::2, ::2], strided[3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dilated[4][..., ::4, ::4], strided[4], rtol=1e-4, atol=1e-4)


def test_other_networks_than_a_resnet_are_refused() -> None:
    with pytest.raises(ValueError, match="nin4 cannot be dilated"):
        dilate(build_backbone("nin4"))


def test_the_heads_of_the_published_network() -> None:
    """Parameter counts of mmsegmentation, and initial values."""
    torch.manual_seed(2)
    model = Fcn(build_backbone("resnet50"), 21)
    shapes = {
        name: tuple(p.shape)
        for name, p in model.named_parameters()
        if not name.startswith("backbone.") and p.ndim == 4
    }
    assert shapes == {
        "decode.convs.0.0.weight": (512, 2048, 3, 3),
        "decode.convs.1.0.weight": (512, 512, 3, 3),
        "decode.concat.0.weight": (512, 2560, 3, 3),
        "decode.classifier.weight": (21, 512, 1, 1),
        "auxiliary.convs.0.0.weight": (256, 1024, 3, 3),
        "auxiliary.classifier.weight": (21, 256, 1, 1),
    }
    for head in (model.decode, model.auxiliary):
        assert head.dropout.p == 0.1 and isinstance(head.dropout, nn.Dropout2d)
        assert float(head.classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert head.classifier.bias is not None and not head.classifier.bias.any()
    weight = model.decode.convs[1][0].weight  # type: ignore[index]
    assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)
    # One rate and one decay for everything, norms and biases included; nothing is frozen.
    groups = param_groups(model, rule="all", weight_decay=5e-4)
    assert {group["weight_decay"] for group in groups} == {5e-4}
    count = sum(len(group["params"]) for group in groups)  # type: ignore[arg-type, misc]
    assert count == len(list(model.parameters()))


def test_head_by_hand() -> None:
    """The concatenation puts the input first, and evaluation drops nothing."""
    torch.manual_seed(3)
    head = FcnHead(6, 4, 3, convs=2, concat=True, dropout=0.5).eval()
    x = torch.randn(2, 6, 5, 7)
    assert head.concat is not None
    one, two, last = (block[0] for block in (*head.convs, head.concat))
    # A new batch norm in evaluation mode divides by sqrt(1 + eps).
    scale = 1 / math.sqrt(1 + 1e-5)
    inner = (two((one(x) * scale).relu()) * scale).relu()
    inner = (last(torch.cat([x, inner], 1)) * scale).relu()
    expected = torch.einsum("kc,bchw->bkhw", head.classifier.weight[:, :, 0, 0], inner)
    torch.testing.assert_close(head(x), expected)
    head.train()
    assert not torch.equal(head(x), head(x))


def test_training_reaches_every_parameter() -> None:
    torch.manual_seed(4)
    model = Fcn(build_backbone("resnet18_tiny"), 3).train()
    assert isinstance(model.backbone, ResNet)
    logits, auxiliary = model(torch.randn(2, 3, 32, 32))
    masks = torch.randint(3, (2, 4, 4))
    (pixel_loss(logits, masks, IGNORED) + pixel_loss(auxiliary, masks, IGNORED)).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_loss_is_the_mean_over_all_pixels() -> None:
    """Against NumPy: ignored pixels add nothing to the sum but count in the mean."""
    draw = np.random.default_rng(5)
    logits = draw.normal(size=(2, 5, 6, 7)).astype(np.float32)
    masks = draw.integers(0, 5, (2, 6, 7))
    masks[draw.random(masks.shape) < 0.3] = IGNORED
    total = 0.0
    for b, y, x in np.ndindex(masks.shape):
        if masks[b, y, x] != IGNORED:
            row = logits[b, :, y, x].astype(np.float64)
            total += np.log(np.exp(row).sum()) - row[masks[b, y, x]]
    found = pixel_loss(torch.from_numpy(logits), torch.from_numpy(masks), IGNORED)
    assert float(found) == pytest.approx(total / masks.size, rel=1e-6)
    nothing = pixel_loss(torch.from_numpy(logits), torch.full((2, 6, 7), IGNORED), IGNORED)
    assert float(nothing) == 0


@pytest.mark.parametrize("align", [False, True])
def test_resizing_by_hand(align: bool) -> None:
    """Bilinear, corner pixel centres or image corners aligned; float32 from bfloat16."""
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 3, 4)
    found = resize_logits(ramp.bfloat16(), (5, 10), align_corners=align)
    places = np.arange(10) * 3 / 9 if align else np.clip((np.arange(10) + 0.5) * 0.4 - 0.5, 0, 3)
    expected = torch.from_numpy(places).float().expand(1, 1, 5, 10)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
