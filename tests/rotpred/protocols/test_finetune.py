"""Fine-tuning on few labels: exact results, grid search, balanced subsets, data with a root."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from pipelines.loader import open_loader
from pipelines.samples import open_samples
from pipelines.sampling.order import draw_balanced
from pipelines.spec import CenterCrop, LoaderSpec, RandomCrop, RandomResizedCrop
from rotpred import cli
from rotpred.distributed import Rank
from rotpred.models.backbone import build_backbone
from rotpred.models.heads import make_rotnet
from rotpred.protocols import finetune
from rotpred.recipes.finetune import RECIPES, FineTuning, in1k_semi
from rotpred.training.schedule import lr_at
from rotpred.training.settings import RunSettings
from rotpred.training.state import TrainState
from rotpred.training.sync_bn import convert_sync_bn
from rotpred.weights.load import save_backbone
from tests.support.classification_trees import Trees, make_trees
from tests.support.run_outputs import results, saved
from tests.support.toy_recipes import toy_fine_tuning

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Trees:
    return make_trees(tmp_path_factory.mktemp("trees"))


def test_end_to_end_from_a_list_of_names(trees: Trees, tmp_path: Path) -> None:
    """All layers change, and top-1 equals the saved network applied to one image at a time."""
    torch.manual_seed(3)
    source = build_backbone("resnet18_tiny")
    weights = tmp_path / "backbone.safetensors"
    save_backbone(weights, source, {})
    made = toy_fine_tuning(trees, tmp_path / "run", "resnet18_tiny", weights=str(weights))
    made = replace(made, run=replace(made.run, epochs=1))
    out = finetune.run(made, Rank())
    state = saved(out)
    for name, parameter in source.named_parameters():
        assert not torch.equal(parameter, state[f"backbone.{name}"]), name
    model = make_rotnet("resnet18_tiny", 4).eval()
    model.load_state_dict(state)
    truth, hits = trees["in1k_semi_1"].truth, 0
    with open_loader(replace(made.val, batch_size=1)) as loader, torch.no_grad():
        for batch, label in zip(loader.epoch(0), truth, strict=True):
            hits += int(model(batch.images).argmax()) == label
    row = results(out)["top1"]
    assert (row["value"], row["n"]) == (pytest.approx(10 * hits), 10)
    assert (row["fraction"], row["lr"], row["head_lr_mult"]) == (0.01, 0.01, 100.0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_in1k_semi_10_by_its_command(trees: Trees, tmp_path: Path) -> None:
    """Decay and fraction are those of ten percent; top-1 recomputed from the saved network."""
    tree, out = trees["in1k_semi_1"], tmp_path / "run"
    args = [
        *("in1k_semi_10", "--weights", "random", "--backbone", "resnet18_tiny"),
        *("--sync-bn", "off", "--run.device", "cpu", "--run.epochs", "1", "--run.out", str(out)),
        *("--train.data", tree.train, "--train.root", tree.train_root, "--train.batch-size", "4"),
        *("--val.data", tree.val, "--val.root", tree.val_root, "--val.batch-size", "4"),
        *("--train.crop.size", "32", "--val.crop.size", "32", "--val.crop.resize", "36"),
        *("--train.engine", "folder", "--val.engine", "folder"),
        *("--train.workers", "1", "--val.workers", "1"),
    ]
    assert cli.evaluate_main(args) == 0
    found = results(out)
    assert set(found) == {"top1"}  # no top-5 with four classes
    made: FineTuning = cli.choose(RECIPES, args, "")
    assert made.optim.weight_decay == 1e-4
    model, hits = make_rotnet("resnet18_tiny", 4).eval(), 0
    model.load_state_dict(saved(out))
    with open_loader(replace(made.val, batch_size=1)) as loader, torch.no_grad():
        for batch, label in zip(loader.epoch(0), tree.truth, strict=True):
            hits += int(model(batch.images).argmax()) == label
    row = found["top1"]
    assert (row["value"], row["n"], row["fraction"]) == (pytest.approx(10 * hits), 10, 0.1)
    assert row["benchmark"] == "in1k_semi_10"


def test_one_step_is_plain_sgd_with_two_rates(trees: Trees, tmp_path: Path) -> None:
    """The first update by hand: rate * (gradient + decay * weight), times 100 for the head."""
    made = toy_fine_tuning(trees, tmp_path)
    made = replace(made, run=replace(made.run, max_steps=1))
    found = saved(finetune.run(made, Rank()))
    torch.manual_seed(made.train.seed)
    backbone = build_backbone("nin3")
    head = make_rotnet("nin3", 4).head
    with open_loader(made.train) as loader:
        batch = next(loader.epoch(0))
        assert len(loader) == 2
    backbone.train()
    F.cross_entropy(head(backbone(batch.images)), batch.targets).backward()
    for prefix, part, rate in (("backbone", backbone, 0.01), ("head", head, 1.0)):
        for name, p in part.named_parameters():
            assert p.grad is not None
            expected = p - rate * (p.grad + 5e-4 * p)
            torch.testing.assert_close(found[f"{prefix}.{name}"], expected, rtol=1e-4, atol=1e-6)


def test_grid(trees: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All points and the best; finished points are kept; a diverging rate is a result."""
    learned: list[Path] = []
    train_step = TrainState.train_step

    def spy(state: TrainState, *args: Any) -> None:
        learned.append(state.folder.parent)
        train_step(state, *args)

    monkeypatch.setattr(TrainState, "train_step", spy)
    made = toy_fine_tuning(trees, tmp_path, grid=True, lrs=(0.01, 1e30), head_lr_mults=(1.0, 10.0))
    assert finetune.run(made, Rank()) == tmp_path
    rows = results(tmp_path)
    names = {"top1/lr=0.01,head=1", "top1/lr=0.01,head=10"}
    assert rows.keys() == names | {"top1"}
    best = max((rows[name] for name in sorted(names)), key=lambda row: row["value"])
    assert rows["top1"]["value"] == best["value"] and best["best"]
    assert [rows[name]["best"] for name in names].count(True) == 1
    assert rows["top1"]["head_lr_mult"] == best["head_lr_mult"]
    assert rows["top1"]["not_finite"] == ["lr=1e+30,head=1", "lr=1e+30,head=10"]
    assert (rows["top1"]["chosen_on"], rows["top1"]["chosen_from"]) == ("val", 4)
    for mult in (1, 10):
        inner = results(tmp_path / f"grid/lr0.01_head{mult}")["top1"]
        assert inner["value"] == rows[f"top1/lr=0.01,head={mult}"]["value"]
    with Image.open(tmp_path / "figures/grid.png") as image:
        assert image.width > 300 and len(np.unique(np.asarray(image.convert("L")))) > 9
    assert len(set(learned)) == 4

    learned.clear()
    (tmp_path / "grid/lr0.01_head10/done.json").unlink()
    for path in (tmp_path / "grid/lr0.01_head10/checkpoints").iterdir():
        path.unlink()
    again = replace(made, lrs=(0.01,))
    finetune.run(again, Rank())
    assert set(learned) == {tmp_path / "grid/lr0.01_head10"} and len(learned) == 4
    assert results(tmp_path)["top1"]["value"] == rows["top1"]["value"]

    # A smaller grid removes the results of the larger one.
    finetune.run(replace(again, head_lr_mults=(10.0,)), Rank())
    rows = results(tmp_path)
    assert set(rows) == {"top1/lr=0.01,head=10", "top1"} and rows["top1"]["chosen_from"] == 1


def test_a_grid_without_any_result_is_an_error(trees: Trees, tmp_path: Path) -> None:
    made = toy_fine_tuning(trees, tmp_path, grid=True, lrs=(1e30,), head_lr_mults=(1.0,))
    with pytest.raises(ValueError, match="finite loss"):
        finetune.run(made, Rank())


def test_deterministic_kernels_while_it_lasts(
    trees: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enabled for the run and restored after it; the same command gives the same bits."""
    seen = []
    point = finetune._point

    def spy(*args: Any) -> Path:
        cudnn = torch.backends.cudnn
        seen.append(
            (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark)
        )
        return point(*args)

    monkeypatch.setattr(finetune, "_point", spy)
    before = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    first = saved(finetune.run(toy_fine_tuning(trees, tmp_path / "a"), Rank()))
    second = saved(finetune.run(toy_fine_tuning(trees, tmp_path / "b"), Rank()))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert seen == [(True, True, False)] * 2
    assert before == (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    assert not torch.are_deterministic_algorithms_enabled()


def test_sync_bn_is_refused_on_several_cpus() -> None:
    """One process has nothing to synchronise."""
    network = nn.Sequential(nn.BatchNorm2d(2))
    convert_sync_bn(network, "torch", Rank(), RunSettings())
    assert type(network[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="--sync-bn off"):
        convert_sync_bn(network, "torch", Rank(world=2), RunSettings())


def test_balanced_draws() -> None:
    """Equal counts per class, nested, different for another seed, every sample equally likely."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), (20, 30, 25, 20, 40)))
    few, more = draw_balanced(labels, 4, seed=1), draw_balanced(labels, 20, seed=1)
    assert Counter(labels[few]) == dict.fromkeys(range(5), 4) and len(more) == 100
    assert set(few) < set(more) and (np.diff(few) > 0).all()
    assert set(few) != set(draw_balanced(labels, 4, seed=2))
    counts = np.zeros(len(labels))
    for seed in range(400):
        counts[draw_balanced(labels, 10, seed=seed)] += 1
    expected = 400 * 10 / np.bincount(labels)[labels]
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    with pytest.raises(ValueError, match="class 0 has 20 samples only"):
        draw_balanced(labels, 21, seed=0)
    with pytest.raises(ValueError, match="a label for every sample"):
        draw_balanced(np.array([0, -1]), 1, seed=0)
    with pytest.raises(ValueError, match="per_class"):
        LoaderSpec(samples_per_class=3, max_samples=7)


def test_a_balanced_draw_is_the_same_for_files_and_betons(folder: Path, beton: Path) -> None:
    """Five of each of three classes among 37 images, once per epoch, the same in every epoch."""
    spec = LoaderSpec(
        data=str(folder), engine="folder", batch_size=4, crop=CenterCrop(16, 16), views="plain",
        workers=1, samples_per_class=5, drop_last=False,
    )  # fmt: skip
    met = []
    for data in (folder, beton):
        with open_loader(replace(spec, data=str(data))) as loader:
            assert len(loader) == 4
            for epoch in range(2):
                batches = list(loader.epoch(epoch))
                indices = torch.cat([b.indices[b.valid] for b in batches])
                labels = torch.cat([b.labels[b.valid] for b in batches])
                assert Counter(labels.tolist()) == {0: 5, 1: 5, 2: 5}
                met.append(sorted(indices.tolist()))
    assert met[0] == met[1] == met[2] == met[3] and len(set(met[0])) == 15


def test_what_needs_a_root_and_what_has_none(trees: Trees, beton: Path, tmp_path: Path) -> None:
    tree = trees["in1k_semi_1"]
    samples = open_samples(tree.train, tree.train_root)
    assert len(samples) == 8 and samples.labels.tolist() == [0, 1, 3, 2] * 2
    with pytest.raises(ValueError, match="needs a root"):
        open_samples(tree.train)
    with pytest.raises(ValueError, match="not for folders"):
        open_samples(tree.train_root, str(tmp_path))
    with pytest.raises(ValueError, match="not for a beton"):
        open_samples(str(beton), str(tmp_path))
    with pytest.raises(ValueError, match="to_beton"):
        open_samples("digits")
    with pytest.raises(FileNotFoundError, match="none"):
        open_samples(str(tmp_path / "none"))


def test_the_published_settings() -> None:
    """docs/protocols.md, Fine-tuning: 4 x 64 images, 20 epochs, rates and decays."""
    for fraction, decay in ((0.01, 5e-4), (0.1, 1e-4)):
        made = in1k_semi(fraction, lr=0.1, head_lr_mult=10)
        assert RECIPES[made.name]() == in1k_semi(fraction)
        assert (made.optim.weight_decay, made.optim.momentum) == (decay, 0.9)
        assert not made.optim.nesterov and made.optim.decay_rule == "all"
        assert made.train.batch_size * 4 == 256 and made.optim.lr_for(256) == 0.1
        assert (made.sync_bn, made.deterministic, made.run.epochs) == ("torch", True, 20)
        assert made.head_lr_mult == 10 and in1k_semi(fraction).head_lr_mult == 100
        assert (made.lrs, made.head_lr_mults) == ((0.1, 0.01, 0.001), (1, 10, 100))
        rates = [lr_at(made.schedule, 1.0, epoch, 20) for epoch in (11.9, 12, 16)]
        assert rates == pytest.approx([1, 0.2, 0.04])
        assert made.train.crop == RandomResizedCrop(224) and made.val.crop == CenterCrop(224, 256)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe(name: str) -> None:
    made = RECIPES[name]()
    assert made.name == name and name.endswith(f"_{round(100 * made.fraction)}")
    assert not (made.val.flip or made.val.shuffle or made.val.drop_last)
    assert made.train.views == made.val.views == "plain" and made.train.flip
    if name.startswith("cifar10"):
        assert made.train.samples_per_class == 5000 * made.fraction
        assert made.train.crop == RandomCrop(32, padding=4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lrs": ()}, "lrs"),
        ({"head_lr_mults": (1.0, 1.0)}, "head_lr_mults"),
        ({"fraction": 0}, "fraction"),
        ({"head_lr_mult": -1.0}, "head_lr_mult must be above 0"),
    ],
)
def test_senseless_values_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FineTuning(**changes)
