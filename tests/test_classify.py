"""Probes: shapes and sources, and the proof that the trunk is frozen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines.spec import CenterCrop, LoaderSpec, RandomCrop
from rotpred import classify, probes
from rotpred.backbone import build_backbone
from rotpred.distributed import Rank
from rotpred.recipes import Linear, Probe, Run
from rotpred.recipes.linear import RECIPES, cifar10_probes, in1k_linear
from rotpred.weights import save_backbone

pytestmark = pytest.mark.timeout(120)


def recipe(out: Path, weights: str) -> Linear:
    spec = LoaderSpec(
        data="synthetic", samples=48, batch_size=8, views="plain", crop=RandomCrop(32, 0)
    )
    return Linear(
        name="tiny",
        weights=weights,
        backbone="nin3",
        train=spec,
        val=replace(spec, samples=19, crop=CenterCrop(32, None), shuffle=False, drop_last=False),
        probes=tuple(Probe(kind) for kind in ("avgpool", "stages", "conv", "nonlinear")),
        run=Run(out=str(out), epochs=1, precision="fp32", device="cpu", log_every=2),
    )


def test_not_one_tensor_of_the_trunk_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, batch norm statistics and counters are bit-equal after a run; the probes moved."""
    weights = tmp_path / "backbone.safetensors"
    source = build_backbone("nin3")
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that training-mode would change
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    save_backbone(weights, source, {})
    seen: list[nn.Module] = []
    load = classify.load_trunk

    def spy(name: str, path: str, rank: Rank) -> tuple[nn.Module, str]:
        trunk, sha = load(name, path, rank)
        seen.append(trunk)
        return trunk, sha

    monkeypatch.setattr(classify, "load_trunk", spy)
    out = classify.run(recipe(tmp_path / "run", str(weights)), Rank())
    (trunk,) = seen
    expected, found = source.state_dict(), trunk.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert not any(p.requires_grad or p.grad is not None for p in trunk.parameters())
    assert not any(m.training for m in trunk.modules())
    assert (out / "results.json").exists()


def test_weights_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--weights random"):
        classify.run(recipe(tmp_path, ""), Rank())


def test_resnet50_stage_probes_have_the_published_lengths() -> None:
    """protocols: 9216, 9216, 8192, 9216, 8192 (mmselfsup multi_pooling.py)."""
    with torch.device("meta"):
        trunk = build_backbone("resnet50")
    heads = probes.stages(trunk, 1000, 224)
    lengths = [m.in_features for h in heads for m in h.modules() if isinstance(m, nn.Linear)]
    assert lengths == [9216, 9216, 8192, 9216, 8192]
    norms = [m for h in heads for m in h.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.num_features for m in norms] == [64, 256, 512, 1024, 2048]
    assert not any(m.affine for m in norms)


def test_the_authors_probes() -> None:
    """conv2 of NIN: 12,288 flat inputs; 200-200-10; 192-192-192-10."""
    trunk = build_backbone("nin4")
    flat = probes.nonlinear(trunk, 10, 32)[1]
    shapes = [tuple(m.weight.shape) for m in flat.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(200, 12288), (200, 200), (10, 200)]
    conv = probes.conv(trunk, 10)[1]
    shapes = [tuple(m.weight.shape) for m in conv.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(192, 192, 3, 3), (192, 192, 1, 1), (192, 192, 1, 1)]


def test_each_set_of_probes_has_its_own_optimiser() -> None:
    """The average pool trains at 30 without decay, the stages at 0.01 with 1e-4."""
    first, second = in1k_linear().probes
    assert (first.optim.lr, first.optim.weight_decay) == (30.0, 0.0)
    assert (second.optim.lr, second.optim.weight_decay, second.optim.nesterov) == (0.01, 1e-4, True)
    assert cifar10_probes().run.epochs == 100


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_evaluate_every_sample_once_as_it_is(name: str) -> None:
    made = RECIPES[name]()
    assert made.name == name
    assert not (made.val.flip or made.val.shuffle or made.val.drop_last)
    assert made.train.views == made.val.views == "plain"
