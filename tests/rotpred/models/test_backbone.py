"""Backbones, against torchvision and the shapes of the papers' code."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torchvision
from torch import nn

from rotpred.models.alexnet import AlexNet
from rotpred.models.backbone import BACKBONES, build_backbone
from rotpred.models.heads import (
    PROBE_DIM,
    AlexNetHead,
    make_rotnet,
    pooled_dims,
    stage_pools,
    stage_shapes,
)
from rotpred.models.names import AVGPOOL, StageName
from rotpred.models.resnet import ResNet

pytestmark = pytest.mark.timeout(120)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def randomise_norms(module: nn.Module) -> None:
    """Set running statistics and affine weights so that swapped layers change the output."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.0)
            nn.init.uniform_(m.bias, -0.2, 0.2)
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2.0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_loads_our_resnet_and_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    net = make_rotnet(name, classes=4).eval()
    randomise_norms(net)
    theirs = getattr(torchvision.models, name)(num_classes=4).eval()
    state = dict(net.backbone.state_dict())
    state.update({f"fc.{k}": v for k, v in net.head.fc.state_dict().items()})
    theirs.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(net(x), theirs(x))
        last = net.backbone(x)
        assert torch.equal(net.backbone.stages(x)[-1], last)
        torch.testing.assert_close(net.backbone.pooled(x), last.mean((2, 3)))


def test_resnet50_stages_are_those_of_the_probe_table() -> None:
    # mmselfsup multi_pooling.py and VISSL's feature names, at 224 pixels.
    net = build_backbone("resnet50").eval()
    with torch.no_grad():
        maps = net.stages(torch.zeros(1, 3, 224, 224))
    shapes = [tuple(m.shape[1:]) for m in maps]
    expected = [(64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    assert shapes == expected == stage_shapes(net, 224)
    assert net.stage_names == ("stem", "res2", "res3", "res4", "res5")
    assert net.stage_channels == tuple(c for c, _, _ in expected)
    assert net.dim == 2048


def test_the_stem_stage_is_taken_before_the_max_pool_and_after_relu() -> None:
    net = build_backbone("resnet18").eval()
    randomise_norms(net)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = torch.relu(net.bn1(net.conv1(x)))
        assert torch.equal(net.stages(x)[0], expected)


@pytest.mark.parametrize(
    ("stem", "side"), [("imagenet", 8), ("small_stride1", 32), ("small_stride2", 16)]
)
def test_small_stems(stem: str, side: int) -> None:
    block = torchvision.models.resnet.BasicBlock
    net = ResNet(block, (2, 2, 2, 2), stem=stem).eval()
    with torch.no_grad():
        maps = net.stages(torch.zeros(1, 3, 32, 32))
    assert [m.shape[2] for m in maps[1:]] == [side, side // 2, side // 4, side // 8]


@pytest.mark.parametrize("blocks", [3, 4, 5])
def test_nin_has_the_authors_maps_at_32_pixels(blocks: int) -> None:
    net = build_backbone(f"nin{blocks}").eval()
    with torch.no_grad():
        maps = net.stages(torch.randn(2, 3, 32, 32))
        assert torch.equal(net(torch.ones(1, 3, 32, 32)), net.stages(torch.ones(1, 3, 32, 32))[-1])
    assert [tuple(m.shape[1:]) for m in maps] == [(96, 16, 16)] + [(192, 8, 8)] * (blocks - 1)
    assert len(net.stage_names) == len(net.stage_channels) == blocks
    assert net.dim == 192


def test_alexnet_has_the_authors_maps_at_224_pixels() -> None:
    net = make_rotnet("alexnet").eval()
    with torch.no_grad():
        maps = net.backbone.stages(torch.randn(1, 3, 224, 224))
        pooled = net.head.pool5(maps[-1]).flatten(1)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (64, 55, 55), (192, 27, 27), (384, 13, 13), (256, 13, 13), (256, 13, 13)
    ]  # fmt: skip
    assert pooled.shape == (1, 9216)
    assert (net.head.fc6.in_features, net.head.fc6.out_features) == (9216, 4096)
    assert net.head.fc6.bias is None and net.head.fc7.bias is None
    assert isinstance(net.head, AlexNetHead) and isinstance(net.backbone, AlexNet)
    assert not any(isinstance(m, nn.Dropout) for m in net.modules())


def test_alexnet_forward_is_its_last_stage() -> None:
    net = build_backbone("alexnet").eval()
    randomise_norms(net)
    x = torch.randn(1, 3, 95, 95)
    with torch.no_grad():
        assert torch.equal(net(x), net.stages(x)[-1])


def conv(inputs: int, outputs: int, kernel: int, bias: int) -> int:
    """Number of parameters of a convolution and its batch norm."""
    return inputs * outputs * kernel * kernel + bias * outputs + 2 * outputs


def test_parameter_counts() -> None:
    # torchvision's published counts minus those of fc (1000 classes).
    assert parameters(build_backbone("resnet50")) == 25_557_032 - 2048 * 1000 - 1000
    assert parameters(build_backbone("resnet18")) == 11_689_512 - 512 * 1000 - 1000
    block1 = conv(3, 192, 5, 0) + conv(192, 160, 1, 0) + conv(160, 96, 1, 0)
    block2 = conv(96, 192, 5, 0) + 2 * conv(192, 192, 1, 0)
    later = conv(192, 192, 3, 0) + 2 * conv(192, 192, 1, 0)
    for blocks in (3, 4, 5):
        expected = block1 + block2 + (blocks - 2) * later
        assert parameters(build_backbone(f"nin{blocks}")) == expected
    sizes = [(3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3)]
    assert parameters(build_backbone("alexnet")) == sum(conv(*size, 1) for size in sizes)
    head = 9216 * 4096 + 2 * 4096 + 4096 * 4096 + 2 * 4096 + 4096 * 4 + 4
    assert parameters(make_rotnet("alexnet").head) == head


def test_resnet50s_pools_give_the_dims_of_the_table() -> None:
    net = build_backbone("resnet50")
    pools = stage_pools(net, 224)
    assert all(isinstance(pool, nn.AvgPool2d) for pool in pools)
    assert pooled_dims(net, 224, pools) == [9216, 9216, 8192, 9216, 8192]
    # nn.AvgPool2d includes padding in the mean: the corner window of the stem has 6x6 real values.
    corner = pools[0](torch.ones(1, 1, 112, 112))[0, 0, 0, 0]
    assert corner.item() == pytest.approx(36 / 100)


def test_adaptive_pools_reproduce_the_published_sides() -> None:
    # ResNet-50 at 224 pixels has the pools above; other sizes have the sides of the adaptive ones.
    resnet = stage_pools(build_backbone("resnet50"), 256)
    assert all(isinstance(pool, nn.AdaptiveAvgPool2d) for pool in resnet)
    assert [pool.output_size for pool in resnet] == [12, 6, 4, 3, 2]  # mmselfsup POOL_SIZES
    alexnet = build_backbone("alexnet")
    pools = stage_pools(alexnet, 224)
    assert all(isinstance(pool, nn.AdaptiveMaxPool2d) for pool in pools)
    assert [pool.output_size for pool in pools] == [12, 7, 5, 6, 6]  # VISSL alexnet_rotnet.yaml
    assert pooled_dims(alexnet, 224, pools) == [9216, 9408, 9600, 9216, 9216]


@pytest.mark.parametrize("name", ["resnet18_small", "nin4"])
def test_pools_never_enlarge_a_small_map(name: str) -> None:
    net = build_backbone(name).eval()
    pools = stage_pools(net, 32)
    dims = pooled_dims(net, 32, pools)
    assert max(dims) <= 1.3 * PROBE_DIM
    with torch.no_grad():
        maps = net.stages(torch.randn(2, 3, 32, 32))
    for pool, stage, dim in zip(pools, maps, dims, strict=True):
        out = pool(stage)
        assert out.shape[2] <= stage.shape[2]
        assert out[0].numel() == dim


def test_pools_of_too_small_an_image_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        stage_pools(build_backbone("alexnet"), 8)


def test_asking_for_shapes_changes_nothing() -> None:
    net = build_backbone("nin3").train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    stage_pools(net, 32)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules())


def test_initialisation() -> None:
    torch.manual_seed(0)
    net = make_rotnet("resnet50")
    assert net.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert net.head.fc.bias.abs().max().item() == 0
    conv2 = net.backbone.layer1[0].conv2.weight  # 3x3 64 -> 64: fan out 576
    assert conv2.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.02)
    small = build_backbone("resnet18_small")
    assert small.conv1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_rotnet_trains_one_step(name: str) -> None:
    size = 224 if name == "alexnet" else 32
    net = make_rotnet(name).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    logits = net(x)
    assert logits.shape == (2, 4)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert net.backbone.arch == name
    prefixes = {key.split(".")[0] for key in net.state_dict()}
    assert prefixes == {"backbone", "head"}


def test_every_stage_has_a_name_that_recipes_take() -> None:
    found = {name for arch in BACKBONES for name in build_backbone(arch).stage_names}
    assert found | {AVGPOOL} == set(get_args(StageName))


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"resnet101.*resnet18, resnet50"):
        build_backbone("resnet101")
