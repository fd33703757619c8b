"""Optimisers: decay groups by module type, SGD and LARS against their formulas, apex."""

from __future__ import annotations

import copy
import math
import sys
import types

import pytest
import torch
from torch import nn

from rotpred.models.backbone import build_backbone
from rotpred.models.heads import make_rotnet
from rotpred.training.optim import Lars, build_optimizer, fused_sgd, param_groups, set_lr
from rotpred.training.settings import Optim

pytestmark = pytest.mark.timeout(60)


def test_linear_scaling_counts_source_images() -> None:
    # VISSL: 0.1 per 256 images. mmselfsup's 0.2 belongs to 128 sources and is not scaled.
    vissl = Optim(lr=0.1, reference_batch=256)
    assert vissl.lr_for(1024) == pytest.approx(0.4)
    assert vissl.lr == 0.1
    assert Optim(lr=0.2).lr_for(4096) == 0.2


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 0.0}, {"lr": math.nan}, {"momentum": 1.0}, {"weight_decay": -1.0},
        {"nesterov": True, "momentum": 0.0}, {"reference_batch": 0}, {"kind": "lars"},
    ],
)  # fmt: skip
def test_contradictory_optimisers_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Optim(**values)


@pytest.mark.parametrize("name", ["resnet50", "alexnet", "nin4"])
def test_every_norm_parameter_is_spared_and_nothing_else(name: str) -> None:
    net = make_rotnet(name)
    norms = {
        id(p)
        for m in net.modules()
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))
        for p in m.parameters(recurse=False)
    }
    if name == "resnet50":  # 53 norms, four of them in shortcuts
        assert len(norms) == 106
        assert id(net.backbone.layer1[0].downsample[1].weight) in norms
    groups = param_groups(net, rule="no_norm", weight_decay=0.5)
    spared = {id(p) for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
    assert spared == norms
    everything = [id(p) for g in groups for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in net.parameters())


def test_biases_are_spared_only_where_the_rule_says_so() -> None:
    net = nn.Sequential(nn.Linear(4, 1), nn.GroupNorm(1, 1), nn.LayerNorm(1))
    net = nn.ModuleDict({"head": net, "sync": nn.SyncBatchNorm(3)})
    everything = {name for name, _ in net.named_parameters()}
    names = {id(p): name for name, p in net.named_parameters()}

    def decayed(rule: str) -> set[str]:
        groups = param_groups(net, rule=rule, weight_decay=1e-4)
        return {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}

    assert decayed("all") == everything
    assert decayed("no_norm") == {"head.0.weight", "head.0.bias"}
    assert decayed("no_norm_no_bias") == {"head.0.weight"}


def test_frozen_and_shared_parameters() -> None:
    first = nn.Linear(2, 2)
    net = nn.Sequential(first, first, nn.Linear(2, 2))
    net[2].weight.requires_grad_(False)
    taken = [p for g in param_groups(net, rule="all", weight_decay=0.0) for p in g["params"]]
    assert len(taken) == 3
    for p in net.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        param_groups(net, rule="all", weight_decay=0.0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_steps_as_written_down(nesterov: bool) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    weight, velocity = net.weight.detach().clone(), torch.zeros(2, 3)
    sgd = build_optimizer(net, Optim(nesterov=nesterov, weight_decay=0.01), 0.1)
    assert isinstance(sgd, torch.optim.SGD)
    for _ in range(3):
        gradient = torch.randn(2, 3)
        net.weight.grad, net.bias.grad = gradient.clone(), torch.zeros(2)
        sgd.step()
        decayed = gradient + 0.01 * weight
        velocity = 0.9 * velocity + decayed
        weight -= 0.1 * (decayed + 0.9 * velocity if nesterov else velocity)
        torch.testing.assert_close(net.weight.detach(), weight)


@pytest.mark.parametrize("nesterov", [False, True])
def test_fused_sgd_survives_an_overflow_in_the_first_step(nesterov: bool) -> None:
    """Infinite gradients under a GradScaler are skipped; later steps equal plain ones."""
    nets = [nn.Linear(3, 2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    common = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    fused = fused_sgd([{"params": list(nets[0].parameters())}], **common)  # type: ignore[arg-type]
    plain = torch.optim.SGD(nets[1].parameters(), **common)  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    # Uninitialised memory from torch is filled with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        for gradient in (math.inf, 1.0, -2.0):
            scale = scaler.scale(torch.ones(())).item()
            for net, factor in zip(nets, (scale, 1.0), strict=True):
                for parameter in net.parameters():
                    parameter.grad = torch.full_like(parameter, gradient * factor)
            scaler.step(fused)
            scaler.update()
            if math.isfinite(gradient):
                plain.step()
            for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
                torch.testing.assert_close(one, other)
    finally:
        torch.use_deterministic_algorithms(False)


def test_lars_steps_as_in_the_paper() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    optim = Optim(kind="lars", decay_rule="no_norm_no_bias", weight_decay=0.05, trust=0.02)
    lars = build_optimizer(net, optim, 0.5)
    assert isinstance(lars, Lars)
    wanted = {name: p.detach().double().clone() for name, p in net.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in wanted.items()}
    for lr in (0.5, 0.5, 0.1):
        set_lr(lars, lr)
        for name, p in net.named_parameters():
            p.grad = torch.randn_like(p)
            w, g = wanted[name], p.grad.double()
            rate, decay = 1.0, 0.0
            if name == "0.weight":
                decay = 0.05
                rate = 0.02 * w.norm().item() / (g.norm().item() + decay * w.norm().item())
            velocity[name] = 0.9 * velocity[name] + lr * rate * (g + decay * w)
            wanted[name] = w - velocity[name]
        lars.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach().double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_lars_survives_zero_weights_and_zero_gradients() -> None:
    net = nn.Linear(2, 2, bias=False)
    lars = build_optimizer(
        net, Optim(kind="lars", decay_rule="no_norm_no_bias", weight_decay=0.0), 0.1
    )
    for weight, gradient, expected in ((0.0, 1.0, -0.1), (1.0, 0.0, 1.0)):
        lars.state.clear()
        nn.init.constant_(net.weight, weight)
        net.weight.grad = torch.full((2, 2), gradient)
        lars.step()
        assert torch.allclose(net.weight, torch.full((2, 2), expected))


@pytest.mark.parametrize("kind", ["sgd", "lars"])
def test_the_state_survives_saving(kind: str) -> None:
    torch.manual_seed(0)
    rule = "no_norm_no_bias"
    net = build_backbone("nin3")
    first = build_optimizer(net, Optim(kind=kind, decay_rule=rule), 0.1)
    gradients = [torch.randn_like(p) for p in net.parameters()]

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for p, gradient in zip(module.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()

    step(net, first)
    twin = copy.deepcopy(net)
    second = build_optimizer(twin, Optim(kind=kind, decay_rule=rule), 0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    step(net, first)
    step(twin, second)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_apex_is_refused_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(1, 1)
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ValueError, match=r"git\+https://github.com/NVIDIA/apex"):
        build_optimizer(net, Optim(kind="apex_sgd"), 0.1)
    # Another package named apex.
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.ModuleType("apex.optimizers"))
    with pytest.raises(ValueError, match="on PyPI is something else"):
        build_optimizer(net, Optim(kind="apex_sgd"), 0.1)


def test_apex_is_used_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = types.ModuleType("apex.optimizers")
    stand_in.FusedSGD = torch.optim.SGD
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", stand_in)
    built = build_optimizer(nn.Linear(1, 1), Optim(kind="apex_sgd", decay_rule="no_norm"), 0.1)
    assert built.param_groups[0]["lr"] == 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sgd_is_fused_on_cuda() -> None:
    built = build_optimizer(nn.Linear(2, 2).cuda(), Optim(), 0.1)
    assert built.param_groups[0]["fused"] is True
