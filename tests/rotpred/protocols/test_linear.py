"""Linear evaluation: probe sizes, the frozen backbone, and every recipe on tiny data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipelines.loader import open_loader
from pipelines.spec import CenterCrop, ColorJitter, LoaderSpec, RandomCrop
from rotpred.distributed import Rank
from rotpred.features import extract
from rotpred.models import probes
from rotpred.models.backbone import build_backbone
from rotpred.models.base import Backbone
from rotpred.models.heads import stage_pools
from rotpred.protocols import linear, run
from rotpred.recipes.linear import RECIPES, Linear, cifar10_probes
from rotpred.recipes.probe import Probe, ProbeKind
from rotpred.training.checkpoint import CheckpointError, CheckpointFolder
from rotpred.training.schedule import Steps, lr_at
from rotpred.training.settings import Optim, RunSettings
from rotpred.weights.load import save_backbone
from tests.support.classification_trees import Tree, Trees, make_trees
from tests.support.run_outputs import results, saved

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
        run=RunSettings(out=str(out), epochs=1, precision="fp32", device="cpu", log_every_steps=2),
    )


def test_not_one_tensor_of_the_backbone_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, batch norm statistics and counters are bit-equal after a run; the probes changed."""
    weights = tmp_path / "backbone.safetensors"
    source = build_backbone("nin3")
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that training mode would change
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    save_backbone(weights, source, {})
    seen: list[nn.Module] = []
    load = run.load_frozen_backbone

    def spy(name: str, path: str, rank: Rank) -> tuple[nn.Module, str]:
        backbone, sha = load(name, path, rank)
        seen.append(backbone)
        return backbone, sha

    monkeypatch.setattr(run, "load_frozen_backbone", spy)
    out = linear.run(recipe(tmp_path / "run", str(weights)), Rank())
    (backbone,) = seen
    expected, found = source.state_dict(), backbone.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert not any(p.requires_grad or p.grad is not None for p in backbone.parameters())
    assert not any(m.training for m in backbone.modules())
    assert (out / "results.json").exists()


def test_a_checkpoint_of_0_2_resumes_with_sync_bn(tmp_path: Path) -> None:
    """Its identity has no `sync_bn`: up to 0.2 there was no choice."""
    made = replace(recipe(tmp_path, "random"), sync_bn="torch", probes=(Probe("avgpool"),))
    linear.run(replace(made, run=replace(made.run, max_steps=1)), Rank())
    latest = CheckpointFolder(tmp_path / "checkpoints").latest()
    assert latest is not None and "sync_bn" not in json.loads(latest.state["identity"])


def test_weights_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--weights random"):
        linear.run(replace(recipe(tmp_path, "random"), weights=None), Rank())


def test_resnet50_stage_probes_have_the_published_lengths() -> None:
    """docs/protocols.md: 9216, 9216, 8192, 9216, 8192 (mmselfsup multi_pooling.py)."""
    with torch.device("meta"):
        backbone = build_backbone("resnet50")
    heads = probes.stages(backbone, 1000, 224)
    lengths = [m.in_features for h in heads for m in h.modules() if isinstance(m, nn.Linear)]
    assert lengths == [9216, 9216, 8192, 9216, 8192]
    norms = [m for h in heads for m in h.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.num_features for m in norms] == [64, 256, 512, 1024, 2048]
    assert not any(m.affine for m in norms)


def test_the_authors_probes() -> None:
    """conv2 of NIN: 12,288 flat inputs; 200-200-10; 192-192-192-10."""
    backbone = build_backbone("nin4")
    flat = probes.nonlinear(backbone, 10, 32)[1]
    shapes = [tuple(m.weight.shape) for m in flat.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(200, 12288), (200, 200), (10, 200)]
    conv = probes.conv(backbone, 10)[1]
    shapes = [tuple(m.weight.shape) for m in conv.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(192, 192, 3, 3), (192, 192, 1, 1), (192, 192, 1, 1)]


def rate(recipe: Linear, epoch: float) -> float:
    probe = recipe.probes[0]
    return lr_at(probe.schedule, probe.optim.lr_for(256), epoch, recipe.run.epochs)


def test_the_authors_probes_begin_as_theirs() -> None:
    """Scaled by fan-out, not fan-in: the authors' `initilize`, computed by hand."""
    torch.manual_seed(0)
    backbone = build_backbone("nin4")
    for probe, expected in (
        (probes.nonlinear(backbone, 10, 32)[1], [(200, 0.1), (200, 0.1), (10, 0.4472)]),
        (
            probes.conv(backbone, 10)[1],
            [(192, 0.03402), (192, 0.10206), (192, 0.10206), (10, 0.4472)],
        ),
    ):
        layers = [part for part in probe.layers if isinstance(part, nn.Linear | nn.Conv2d)]
        assert [layer.weight.shape[0] for layer in layers] == [width for width, _ in expected]
        for layer, (_, deviation) in zip(layers, expected, strict=True):
            assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05)
            assert layer.bias is None or not layer.bias.any()


def test_the_published_settings() -> None:
    """docs/protocols.md, Linear evaluation: 256 images per step; rates around each change."""
    tables = {
        "in1k_linear": {59: 30.0, 60: 3.0, 80: 0.3, 99: 0.3},
        "in1k_mhead": {29: 0.01, 30: 1e-3, 60: 1e-4, 89: 1e-4},
        "inat18_mhead": {23: 0.01, 24: 1e-3, 48: 1e-4, 72: 1e-5, 83: 1e-5},
        "places205_mhead": {6: 0.01, 7: 1e-3, 14: 1e-4, 21: 1e-5, 27: 1e-5},
        "places205_mhead_vissl": {3: 0.01, 4: 1e-3, 8: 1e-4, 12: 1e-5, 13: 1e-5},
    }
    for name, table in tables.items():
        made = RECIPES[name]()
        (probe,) = made.probes
        assert made.run.epochs == max(table) + 1 and made.train.batch_size * 8 == 256
        for epoch, lr in table.items():
            assert rate(made, epoch) == pytest.approx(lr), (name, epoch)
        assert made.val.crop == CenterCrop(224, 256) and made.train.flip
        pooled = name == "in1k_linear"
        assert (probe.kind == "avgpool", probe.optim.nesterov) == (pooled, not pooled)
        vissl = name.endswith("vissl")
        assert probe.optim.weight_decay == (0.0 if pooled else 5e-4 if vissl else 1e-4)
        assert probe.affine == vissl == (probe.optim.decay_rule == "no_norm")
        assert made.train.color_jitter.active == (name == "in1k_mhead")
    color = RECIPES["in1k_mhead"]().train.color_jitter
    assert color == ColorJitter(0.4, 0.4, 0.4, 0.0, 0.1)
    assert RECIPES["places205_mhead"]().train.crop == RandomCrop(224, 0, 256)
    assert cifar10_probes().run.epochs == 100


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_evaluate_every_sample_once_as_it_is(name: str) -> None:
    made = RECIPES[name]()
    assert made.name == name
    assert not (made.val.flip or made.val.shuffle or made.val.drop_last)
    assert made.train.views == made.val.views == "plain"


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Trees:
    return make_trees(tmp_path_factory.mktemp("trees"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Backbone]:
    """A file of random weights, and the network."""
    torch.manual_seed(5)
    backbone = build_backbone("resnet18_tiny").eval()
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_backbone(path, backbone, {})
    return str(path), backbone


def small(made: Linear, out: Path, weights: str, tree: Tree) -> Linear:
    """A recipe on its tiny data set: 32 pixels, 6 images per step, one epoch."""
    crop = replace(made.train.crop, size=32)
    if isinstance(crop, RandomCrop):
        crop = replace(crop, resize=36)
    common: dict[str, Any] = {"engine": "folder", "workers": 1}
    train = replace(made.train, data=tree.train, root=tree.train_root, crop=crop, **common)
    val = replace(made.val, data=tree.val, root=tree.val_root, crop=CenterCrop(32, 36), **common)
    return replace(
        made,
        backbone="resnet18_tiny",
        weights=weights,
        train=replace(train, batch_size=6),
        val=replace(val, batch_size=4),
        run=RunSettings(out=str(out), epochs=1, precision="fp32", device="cpu", log_every_steps=1),
    )


@pytest.mark.parametrize(
    "name",
    ["in1k_linear", "in1k_mhead", "inat18_mhead", "places205_mhead", "places205_mhead_vissl"],
)
def test_recipes_end_to_end(
    name: str, trees: Trees, weights: tuple[str, Backbone], tmp_path: Path
) -> None:
    """From the published layout; top-1 recomputed from the saved weights, one image at a time."""
    tree = trees[name]
    made = small(RECIPES[name](), tmp_path, weights[0], tree)
    out = linear.run(made, Rank())
    rows, model, backbone = results(out), saved(out), weights[1]
    pools = stage_pools(backbone, 32)
    affine = made.probes[0].affine
    stages = ["avgpool"] if name == "in1k_linear" else list(backbone.stage_names)
    hits = dict.fromkeys(stages, 0)
    with open_loader(replace(made.val, batch_size=1)) as loader, torch.no_grad():
        for batch, truth in zip(loader.epoch(0), tree.truth, strict=True):
            maps = backbone.stages(batch.images)
            for i, stage in enumerate(stages):
                if stage == "avgpool":
                    logits = F.linear(
                        maps[-1].mean((2, 3)),
                        model[f"{i}.layers.2.weight"], model[f"{i}.layers.2.bias"],
                    )  # fmt: skip
                else:
                    part = {k.split(".", 2)[2]: v for k, v in model.items() if k[0] == str(i)}
                    assert ("1.weight" in part) == affine
                    pooled = F.batch_norm(
                        pools[i](maps[i]), part["1.running_mean"], part["1.running_var"],
                        part.get("1.weight"), part.get("1.bias"),
                    )  # fmt: skip
                    logits = F.linear(pooled.flatten(1), part["3.weight"], part["3.bias"])
                hits[stage] += int(logits.argmax()) == truth
    assert len(tree.truth) == rows[f"top1/{stages[0]}"]["n"] == 10
    for stage in stages:
        assert rows[f"top1/{stage}"]["value"] == pytest.approx(10 * hits[stage]), stage
    assert 0 < sum(hits.values()) < 10 * len(stages) or name == "in1k_linear"


KINDS: tuple[ProbeKind, ...] = ("avgpool", "stages")


def cached(out: Path, weights: str, trees: Trees, **changes: Any) -> Linear:
    optim = Optim(lr=0.1, weight_decay=1e-3)
    made = small(RECIPES["in1k_linear"](), out, weights, trees["in1k_linear"])
    made = replace(made, probes=tuple(Probe(kind, optim, Steps((1,))) for kind in KINDS))
    return replace(made, run=replace(made.run, epochs=2), eval_every_epochs=2, **changes)


def test_cached_features_train_what_plain_images_train(
    trees: Trees, weights: tuple[str, Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same order, initial values and steps as a run without augmentation."""
    on_images = cached(tmp_path / "a", weights[0], trees)
    still = replace(on_images.train, crop=on_images.val.crop, flip=False)
    plain = linear.run(replace(on_images, train=still), Rank())
    cache = str(tmp_path / "features")
    fast = linear.run(cached(tmp_path / "b", weights[0], trees, cache=cache), Rank())
    one, other = saved(plain), saved(fast)
    assert one.keys() == other.keys() and len(one) > 20
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5, msg=name)
    for metric, row in results(plain).items():
        found = results(fast)[metric]
        assert found["value"] == row["value"] and "protocol" not in row
        assert found["protocol"] == linear.CACHED

    def fail(*_: object) -> None:
        raise AssertionError("features are on disk already")

    monkeypatch.setattr(extract, "_compute", fail)
    sweep = cached(tmp_path / "c", weights[0], trees, cache=cache)
    sweep = replace(sweep, probes=tuple(replace(p, lrs=(0.1, 1e-6)) for p in sweep.probes))
    assert "top1/res4@1e-06" in results(linear.run(sweep, Rank()))
    with pytest.raises(ValueError, match="avgpool and stages"):
        linear.run(replace(sweep, probes=(Probe("conv"),)), Rank())


def test_features_of_half_the_size(
    trees: Trees, weights: tuple[str, Backbone], tmp_path: Path
) -> None:
    """Separate arrays, nearly the same probes, and results that name the dtype."""
    cache = tmp_path / "features"
    whole = cached(tmp_path / "a", weights[0], trees, cache=str(cache))
    half = cached(tmp_path / "b", weights[0], trees, cache=str(cache), store="float16")
    one, other = (results(linear.run(made, Rank())) for made in (whole, half))
    assert one.keys() == other.keys()
    assert {row["protocol"] for row in one.values()} == {linear.CACHED}
    assert {row["protocol"] for row in other.values()} == {f"{linear.CACHED}, stored as float16"}
    before, after = saved(tmp_path / "a"), saved(tmp_path / "b")
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    for name, tensor in before.items():
        torch.testing.assert_close(tensor, after[name], rtol=0.02, atol=2e-3, msg=name)
    types = [np.load(file, mmap_mode="r").dtype for file in sorted(cache.glob("*/res5.npy"))]
    assert sorted(map(str, types)) == ["float16"] * 2 + ["float32"] * 2
    with pytest.raises(CheckpointError, match="store"):
        linear.run(replace(half, store="float32"), Rank())
    with pytest.raises(ValueError, match="store float16 needs a cache: pass --cache FOLDER"):
        linear.run(replace(half, cache=None), Rank())


def test_rates_side_by_side_are_what_each_is_alone(
    trees: Trees, weights: tuple[str, Backbone], tmp_path: Path
) -> None:
    """One pass: weights of the first rate are bit-equal to a separate run; the best is named."""
    alone = cached(tmp_path / "a", weights[0], trees)
    alone = replace(alone, probes=alone.probes[1:])
    both = replace(
        alone,
        probes=(replace(alone.probes[0], lrs=(0.1, 1e-7)),),
        run=replace(alone.run, out=str(tmp_path / "b")),
    )
    first, second = saved(linear.run(alone, Rank())), saved(linear.run(both, Rank()))
    assert len(second) == 2 * len(first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    rows, before = results(tmp_path / "b"), results(tmp_path / "a")
    for stage in weights[1].stage_names:
        pair = [rows[f"top1/{stage}@{lr}"] for lr in ("0.1", "1e-07")]
        assert pair[0]["value"] == before[f"top1/{stage}"]["value"]
        top = max(row["value"] for row in pair)
        chosen = rows[f"top1/{stage}"]
        assert chosen["value"] == top and chosen["chosen_on"] == "val"
        assert [row["lr"] for row in pair if row["best"]] == [chosen["lr"]]
        assert (chosen["chosen_from"], sum(row["best"] for row in pair)) == (2, 1)


def test_probes_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    twice = replace(recipe(tmp_path, "random"), probes=(Probe("avgpool"), Probe("avgpool")))
    with pytest.raises(ValueError, match="same name: avgpool, avgpool"):
        linear.run(twice, Rank())
    for senseless in ({"lrs": (0.1, 0.1)}, {"lrs": (0.0,)}, {"affine": True}):
        with pytest.raises(ValueError, match=r"lrs|affine"):
            Probe("avgpool", **senseless)


def test_a_run_with_color_jitter_resumes_exactly(
    trees: Trees, weights: tuple[str, Backbone], tmp_path: Path
) -> None:
    """Interrupted inside an epoch and resumed: the same bits. Other color settings are refused."""
    name = "in1k_mhead"
    made = small(RECIPES[name](), tmp_path / "a", weights[0], trees[name])
    made = replace(made, run=replace(made.run, epochs=2))
    whole = saved(linear.run(made, Rank()))
    first = replace(made, run=replace(made.run, out=str(tmp_path / "b"), max_steps=3))
    assert any(not torch.equal(t, whole[n]) for n, t in saved(linear.run(first, Rank())).items())
    rest = replace(first, run=replace(first.run, max_steps=None))
    dull = replace(rest, train=replace(rest.train, color_jitter=ColorJitter(brightness=0.4)))
    with pytest.raises(CheckpointError, match="color"):
        linear.run(dull, Rank())
    for key, tensor in saved(linear.run(rest, Rank())).items():
        assert torch.equal(tensor, whole[key]), key
