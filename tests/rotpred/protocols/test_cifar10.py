"""The CIFAR-10 recipes run by their commands on tiny data, with exact results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pipelines.conversion.convert import write_beton
from pipelines.datasets.index import SampleIndex
from pipelines.loader import open_loader
from pipelines.spec import CIFAR10, LoaderSpec
from rotpred import cli
from rotpred.models.backbone import build_backbone
from rotpred.models.base import Backbone
from rotpred.models.heads import make_rotnet
from rotpred.recipes.every import EVALUATION
from rotpred.weights.load import save_backbone
from tests.support.images import save_jpeg, smooth_image
from tests.support.references import LOW_COSTS, class_aps, knn_hits, low_shot_maps, unit_rows
from tests.support.run_outputs import results, saved

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN, TEST = 60, 37
STAGES = ("stem", "res2", "res3", "res4", "res5")
BLOCKS = ("conv1", "conv2", "conv3", "conv4")
SHORT = ["--run.epochs", "1", "--run.precision", "fp32", "--run.keep-checkpoints", "2"]
LOW = ["--costs", *map(str, LOW_COSTS)]
"""Costs for which scikit-learn converges to the last digits quickly."""

OPTIONS = {
    "cifar10_linear": ["--train.batch-size", "20", *SHORT],
    "cifar10_probes": ["--train.batch-size", "10", "--train.max-samples", "20", *SHORT],
    "cifar10_knn": ["--neighbours", "1", "5"],
    "cifar10_svm": LOW,
    "cifar10_lowshot": ["--shots", "1", "2", "--draws", "2", *LOW],
    "cifar10_semi_1": ["--train.samples-per-class", "4", "--train.batch-size", "10", *SHORT],
    "cifar10_semi_10": ["--train.samples-per-class", "6", "--train.batch-size", "10", *SHORT],
}
METRICS = {
    "cifar10_linear": {f"top{k}/{name}" for k in (1, 5) for name in (*STAGES, "avgpool")},
    "cifar10_probes": {
        f"top{k}/{block}{kind}"
        for k in (1, 5)
        for block in BLOCKS
        for kind in ("", "/conv", "/nonlinear")
    },
    "cifar10_knn": {f"top{t}/k={k}" for t in (1, 5) for k in (1, 5)},
    "cifar10_svm": {f"{m}/{name}" for m in ("mAP", "mAP11") for name in (*STAGES, "avgpool")},
    "cifar10_lowshot": {f"mAP/{name}/k={k}" for name in STAGES[2:] for k in (1, 2)},
    "cifar10_semi_1": {"top1", "top5"},
    "cifar10_semi_10": {"top1", "top5"},
}

Rows = npt.NDArray[np.float32]
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def betons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Images of 32 pixels: a pattern of the class blended with one of the image."""
    base = tmp_path_factory.mktemp("cifar10")
    for part, count in (("train", TRAIN), ("test", TEST)):
        for i in range(count):
            shared, own = smooth_image(i % 10, 32, 32), smooth_image(100 + count + i, 32, 32)
            path = base / part / CLASSES[i % 10] / f"{i:03}.jpg"
            save_jpeg(path, Image.blend(shared, own, 0.7))
        write_beton(SampleIndex.from_folder(base / part), base / f"{part}.beton", workers=1)
    return {part: str(base / f"{part}.beton") for part in ("train", "test")}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Backbone, str]]:
    """Networks with random weights and their files, by architecture."""
    base, found = tmp_path_factory.mktemp("weights"), {}
    for arch in ("resnet18_tiny", "nin4"):
        torch.manual_seed(3)
        path = base / f"{arch}.safetensors"
        net = build_backbone(arch).eval()
        save_backbone(path, net, {})
        found[arch] = net, str(path)
    return found


def features(backbone: Backbone, spec: LoaderSpec) -> tuple[list[list[torch.Tensor]], list[int]]:
    """Feature maps of all stages, one image at a time, and the labels."""
    maps, labels = [], []
    with open_loader(spec) as loader, torch.no_grad():
        for batch in loader.epoch(0):
            for image, label, valid in zip(batch.images, batch.labels, batch.valid, strict=True):
                if valid:
                    maps.append(list(backbone.stages(image[None])))
                    labels.append(int(label))
    return maps, labels


def last(backbone: Backbone, spec: LoaderSpec, *, averaged: bool) -> tuple[Rows, list[int]]:
    """The last feature map, flattened or averaged: it is too small for other pooling."""
    maps, labels = features(backbone, spec)
    tops = [of_one[-1].mean((2, 3)) if averaged else of_one[-1] for of_one in maps]
    return np.stack([top.numpy().ravel() for top in tops]), labels


def tops(logits: list[torch.Tensor], truth: list[int]) -> list[float]:
    """Top-1 and top-5 in percent."""
    ranked = [row.flatten().argsort(descending=True).tolist() for row in logits]
    return [
        100 * float(np.mean([t in r[:k] for r, t in zip(ranked, truth, strict=True)]))
        for k in (1, 5)
    ]


def check_linear(recipe: Any, backbone: Backbone, found: Found, out: Path) -> None:
    model = saved(out)
    maps, truth = features(backbone, recipe.val)
    logits = [
        F.linear(of_one[-1].mean((2, 3)), model["0.layers.2.weight"], model["0.layers.2.bias"])
        for of_one in maps
    ]
    for k, value in zip((1, 5), tops(logits, truth), strict=True):
        assert found[f"top{k}/avgpool"]["value"] == pytest.approx(value)


def check_probes(recipe: Any, backbone: Backbone, found: Found, out: Path) -> None:
    """The non-linear probe of the last block: the eighth of twelve classifiers."""
    own = {k.removeprefix("7.layers."): v for k, v in saved(out).items() if k.startswith("7.")}
    maps, truth = features(backbone, recipe.val)
    logits = []
    for of_one in maps:
        x = of_one[-1].flatten(1)
        for i in (1, 4):
            x = F.linear(x, own[f"{i}.weight"])
            norm = (own[f"{i + 1}.{name}"] for name in ("running_mean", "running_var", "weight"))
            x = F.batch_norm(x, *norm, own[f"{i + 1}.bias"]).relu()
        logits.append(F.linear(x, own["7.weight"], own["7.bias"]))
    for k, value in zip((1, 5), tops(logits, truth), strict=True):
        assert found[f"top{k}/conv4/nonlinear"]["value"] == pytest.approx(value)


def check_knn(recipe: Any, backbone: Backbone, found: Found, _out: Path) -> None:
    bank, ids = last(backbone, recipe.train, averaged=True)
    queries, truth = last(backbone, recipe.val, averaged=True)
    assert (recipe.temperature, recipe.normalize) == (0.07, True)
    for k in (1, 5):
        hits = knn_hits(bank, queries, np.array(ids), np.array(truth), k, 0.07, cosine=True)
        for top, count in zip((1, 5), hits, strict=True):
            assert found[f"top{top}/k={k}"]["value"] == pytest.approx(100 * count / TEST)


def check_svm(recipe: Any, backbone: Backbone, found: Found, _out: Path) -> None:
    row = found["mAP/avgpool"]
    assert row["classes"] == list(CLASSES)
    expected = class_aps(*tables(recipe, backbone, averaged=True))
    assert row["per_class"] == pytest.approx(expected, abs=1e-6)
    assert row["value"] == pytest.approx(100 * np.mean(expected), abs=1e-6)


def check_lowshot(recipe: Any, backbone: Backbone, found: Found, _out: Path) -> None:
    expected = low_shot_maps(*tables(recipe, backbone, averaged=False), shots=2, draws=2)
    row = found["mAP/res5/k=2"]
    assert row["value"] == pytest.approx(100 * expected.mean(), abs=1e-6)
    assert row["deviation"] == pytest.approx(100 * expected.std(), abs=1e-6)


def tables(recipe: Any, backbone: Backbone, *, averaged: bool) -> tuple[Any, ...]:
    """Features of training and test data, and one-against-rest labels of both."""
    parts = [last(backbone, spec, averaged=averaged) for spec in (recipe.train, recipe.val)]
    signs = [
        np.where(np.array(labels)[:, None] == np.arange(10), 1, -1).astype(np.int8)
        for _, labels in parts
    ]
    return *(unit_rows(rows) for rows, _ in parts), *signs


def check_semi(recipe: Any, backbone: Backbone, found: Found, out: Path) -> None:
    """Accuracy of the saved network, all of whose layers have changed."""
    model, state = make_rotnet(backbone.arch, 10).eval(), saved(out)
    model.load_state_dict(state)
    for name, parameter in backbone.named_parameters():
        assert not torch.equal(parameter, state[f"backbone.{name}"]), name
    maps, truth = features(model.backbone, recipe.val)
    with torch.no_grad():
        logits = [model.head(of_one[-1]) for of_one in maps]
    for k, value in zip((1, 5), tops(logits, truth), strict=True):
        assert found[f"top{k}"]["value"] == pytest.approx(value)
    assert found["top1"]["fraction"] == int(recipe.name.rpartition("_")[2]) / 100


CHECKS: dict[str, Callable[[Any, Backbone, Found, Path], None]] = {
    "cifar10_linear": check_linear,
    "cifar10_probes": check_probes,
    "cifar10_knn": check_knn,
    "cifar10_svm": check_svm,
    "cifar10_lowshot": check_lowshot,
    "cifar10_semi_1": check_semi,
    "cifar10_semi_10": check_semi,
}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_end_to_end(
    name: str,
    betons: dict[str, str],
    backbones: dict[str, tuple[Backbone, str]],
    tmp_path: Path,
) -> None:
    """Every metric with the right n; one per recipe recomputed from the weights, image by image."""
    arch = "nin4" if name == "cifar10_probes" else "resnet18_tiny"
    backbone, weights = backbones[arch]
    args = [name, "--weights", weights, "--backbone", arch, *OPTIONS[name]]
    args += ["--run.device", "cpu", "--run.out", str(tmp_path / "run")]
    for part, data in (("train", betons["train"]), ("val", betons["test"])):
        args += [f"--{part}.data", data, f"--{part}.engine", "folder", f"--{part}.workers", "1"]
    if "cache" in vars(EVALUATION[name]().run):
        args += ["--cache", str(tmp_path / "cache")]
    assert cli.evaluate_main(args) == 0
    found = results(tmp_path / "run")
    assert set(found) == METRICS[name]
    for metric, row in found.items():
        assert (row["benchmark"], row["n"], row["unit"]) == (name, TEST, "%"), metric
        assert 0 <= row["value"] <= 100
    recipe = cli.choose(EVALUATION, args, "")
    assert recipe.val.normalize == recipe.train.normalize == CIFAR10
    CHECKS[name](recipe, backbone, found, tmp_path / "run")


def test_every_recipe_is_here() -> None:
    """Except the rotation head, which has its own test."""
    names = {name for name in EVALUATION if name.startswith("cifar10_")}
    assert names - {"cifar10_rotation"} == set(OPTIONS) == set(METRICS) == set(CHECKS)
