"""k-nearest-neighbour recipes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pipelines.spec import CenterCrop, LoaderSpec
from rotpred.features.base import AVGPOOL, Store
from rotpred.recipes.base import PLAIN, CachedFeatureRun, cifar10_data
from rotpred.recipes.pretrain import rotnet_cifar10_r18


@dataclass(frozen=True)
class Knn:
    """Weighted nearest neighbours in the features of one stage."""

    name: str = "knn"
    """Names the run in results and in the default run folder."""
    weights: str = ""
    """backbone.safetensors, a checkpoint or another project's file, "random", or "imagenet":
    torchvision's, trained with labels."""
    backbone: str = "resnet50"
    """The architecture of the weights."""
    train: LoaderSpec = PLAIN
    """Labelled data among which neighbours are found."""
    val: LoaderSpec = PLAIN
    """Labelled test data."""
    stage: str = AVGPOOL
    """A stage of the backbone, or avgpool."""
    neighbours: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours k that vote; each is reported."""
    temperature: float = 0.07
    """T: a neighbour's vote is exp(similarity / T)."""
    normalize: bool = True
    """Cosine similarity; False (VISSL's default, with temperature 0.1) is the dot product."""
    store: Store = "float32"
    """Type of the features on disk; the similarities are float32."""
    run: CachedFeatureRun = field(default_factory=CachedFeatureRun)
    """Where it works."""

    def __post_init__(self) -> None:
        if not self.neighbours or min(self.neighbours) < 1 or self.temperature <= 0:
            raise ValueError("neighbours must be at least 1, and temperature positive")


def in1k_knn() -> Knn:
    """ImageNet-1k, ResNet-50: nearest neighbours in the averaged last map.

    Source: mmselfsup, tools/benchmarks/classification/knn_imagenet and mmselfsup/evaluation/
    functional/knn_eval.py. Features are kept as float16 (ours): --store float32 as published.
    VISSL (vissl/utils/knn_utils.py) takes 200 neighbours, no normalisation and temperature 0.1:
    --no-normalize --temperature 0.1 --neighbours 200; by default of the output of its head, which
    is not offered.
    Command: torchrun --nproc-per-node 8 scripts/evaluate.py in1k_knn --weights FILE
    Published (mmselfsup): k = 10 / 20 / 100 / 200: 11.0 / 11.9 / 12.6 / 12.4.
    """
    spec = replace(PLAIN, batch_size=128, crop=CenterCrop(224, 256))
    return Knn(
        name="in1k_knn",
        train=replace(spec, data="data/imagenet/train.beton"),
        val=replace(spec, data="data/imagenet/val.beton"),
        store="float16",
    )


def cifar10_knn() -> Knn:
    """CIFAR-10: nearest neighbours among all 50,000 training images.

    Source: as `in1k_knn`.
    Command: torchrun --nproc-per-node 1 scripts/evaluate.py cifar10_knn --weights FILE
    """
    train, val = cifar10_data()
    return Knn(name="cifar10_knn", backbone=rotnet_cifar10_r18().backbone, train=train, val=val)


RECIPES = {recipe.__name__: recipe for recipe in (in1k_knn, cifar10_knn)}
