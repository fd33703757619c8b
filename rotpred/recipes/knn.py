"""k-nearest-neighbour recipes. Each docstring: source, command, published result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from pipelines.checks import NOT_EMPTY, PositiveFloat, PositiveInt
from pipelines.spec import CenterCrop
from rotpred.models.names import AVGPOOL, StageName
from rotpred.recipes.base import PLAIN, OnFeatures, cifar10_data
from rotpred.recipes.pretrain import rotnet_cifar10_r18


@dataclass(frozen=True)
class Knn(OnFeatures):
    """Weighted k-nearest-neighbour classification on the features of one stage."""

    name: str = "knn"
    stage: StageName = AVGPOOL
    """Stage of the backbone, or avgpool."""
    neighbours: Annotated[tuple[PositiveInt, ...], NOT_EMPTY] = (10, 20, 100, 200)
    """Values of k, the number of neighbours that vote. Each is reported."""
    temperature: PositiveFloat = 0.07
    """Temperature T: the vote of a neighbour is exp(similarity / T)."""
    normalize: bool = True
    """Similarity: cosine if true, dot product if false (VISSL's default, with temperature 0.1)."""


def in1k_knn() -> Knn:
    """ImageNet-1k, ResNet-50: nearest neighbours in the average-pooled last feature map.

    Source: mmselfsup, tools/benchmarks/classification/knn_imagenet and mmselfsup/evaluation/
    functional/knn_eval.py. Features are stored as float16 (ours); --store float32 as published.
    VISSL (vissl/utils/knn_utils.py) has 200 neighbours, no normalisation and temperature 0.1:
    --no-normalize --temperature 0.1 --neighbours 200. Its default feature, the output of its head,
    is not available here.
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
