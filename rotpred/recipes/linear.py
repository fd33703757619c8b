"""Linear evaluation recipes: probes on a frozen backbone. Docstrings: source, command, result."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from pipelines.checks import NOT_EMPTY, NonEmptyStr, PositiveInt
from pipelines.spec import (
    NO_COLOR_JITTER,
    CenterCrop,
    ColorJitter,
    Crop,
    LoaderSpec,
    RandomCrop,
    RandomResizedCrop,
)
from rotpred.features.base import Store
from rotpred.models.names import BackboneName
from rotpred.recipes.base import PLAIN, FromWeights, Trained, cifar10_data
from rotpred.recipes.pretrain import quickstart, rotnet_cifar10_nin, rotnet_cifar10_r18
from rotpred.recipes.probe import Probe
from rotpred.training.schedule import Steps, Table, Triangle
from rotpred.training.settings import Optim, RunSettings


@dataclass(frozen=True)
class Linear(Trained, FromWeights):
    """Linear evaluation: classifiers on a frozen backbone."""

    name: str = "linear"
    train: LoaderSpec = field(default_factory=lambda: LoaderSpec(views="plain"))
    """Labelled training data."""
    val: LoaderSpec = PLAIN
    """Labelled validation data."""
    probes: Annotated[tuple[Probe, ...], NOT_EMPTY] = (Probe(),)
    """Sets of classifiers. All are trained in the same pass, each set with its own optimiser."""
    cache: NonEmptyStr | None = None
    """Folder for cached features, e.g. runs/features. Features of the training images, with the
    validation crop, are extracted once; avgpool and stages probes are trained on them. Training
    takes seconds if they stay in memory (small data sets). Larger ones are read from disk in every
    epoch (in1k_mhead: 226 GB as float32). There is no augmentation, so results differ from the
    published protocol's. None: augmented images go through the backbone in every epoch."""
    store: Store = "float32"
    """Type of the cached features. float16 halves the space and keeps 11 bits of each value; the
    results mention it. Probes compute in float32."""
    eval_every_epochs: PositiveInt = 10
    run: RunSettings = field(default_factory=lambda: RunSettings(epochs=100))


_MHEAD = Optim(lr=0.01, nesterov=True, weight_decay=1e-4, reference_batch=256)
"""Optimiser of the multi-head probes."""


def _large(
    name: str, data: str, *, crop: Crop, color_jitter: ColorJitter = NO_COLOR_JITTER
) -> Linear:
    """ResNet-50 at 224 pixels, 256 images a step on 8 GPUs."""
    return Linear(
        name=name,
        backbone="resnet50",
        train=LoaderSpec(
            data=f"data/{data}/train.beton",
            batch_size=32,
            crop=crop,
            views="plain",
            color_jitter=color_jitter,
        ),
        val=replace(
            PLAIN, data=f"data/{data}/val.beton", batch_size=128, crop=CenterCrop(224, 256)
        ),
        sync_bn="torch",
    )


def in1k_linear() -> Linear:
    """ImageNet-1k, ResNet-50: a linear classifier on the average pool.

    Source: MoCo, main_lincls.py, and mmselfsup, resnet50_linear-8xb32-steplr-100e_in1k.py: rate 30
    for 256 images, no decay, x0.1 at 60 and 80, 100 epochs, random crop and flip. bf16 backbone
    (ours); --run.precision fp32 as published.
    VISSL (optimizers/moco.yaml) uses Nesterov momentum: --probes.0.optim.nesterov
    Command: torchrun --nproc-per-node 8 scripts/evaluate.py in1k_linear --weights FILE
    (several rates in one pass: --probes.0.lrs 3 10 30; cached features without augmentation:
    --cache runs/features)
    Published (mmselfsup): 47.0; OpenSelfSup: 47.01, random weights 4.35.
    """
    return replace(
        _large("in1k_linear", "imagenet", crop=RandomResizedCrop(224)),
        probes=(
            Probe(
                "avgpool",
                Optim(lr=30.0, weight_decay=0.0, reference_batch=256),
                Steps((60, 80), gamma=0.1),
            ),
        ),
        run=RunSettings(epochs=100, precision="bf16"),
    )


def in1k_mhead() -> Linear:
    """ImageNet-1k, ResNet-50: a linear classifier on each of the five stages, in one pass.

    Source: mmselfsup 0.x, resnet50_mhead_linear-8xb32-steplr-90e_in1k.py, which the published
    numbers belong to: rate 0.01 for 256 images, nesterov, decay 1e-4, x0.1 at 30 and 60, 90 epochs,
    batch norm without affine parameters, color jitter 0.4 and PCA lighting 0.1. 1.x inherits steps
    at 60 and 80 and omits the stem. bf16 backbone (ours); --run.precision fp32 as published.
    VISSL (eval_resnet_8gpu_transfer_in1k_linear.yaml) has 28 epochs, other decay, affine batch norm
    and no jitter. It also has two more heads (average of res5, with and without batch norm) and
    torch's default initialisation of linear layers (ours: N(0, 0.01)). These two have no option
    here. For the rest:
    --run.epochs 28 --probes.0.schedule.milestones 8 16 24 --probes.0.affine
    --probes.0.optim.weight-decay 5e-4 --probes.0.optim.decay-rule no_norm
    --train.color-jitter.brightness 0 --train.color-jitter.contrast 0
    --train.color-jitter.saturation 0 --train.color-jitter.lighting 0
    Command: torchrun --nproc-per-node 8 scripts/evaluate.py in1k_mhead --weights FILE
    Published (mmselfsup), feature 1-5: 12.15 / 31.99 / 44.57 / 54.20 / 45.94.
    """
    color_jitter = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, lighting=0.1)
    return replace(
        _large("in1k_mhead", "imagenet", crop=RandomResizedCrop(224), color_jitter=color_jitter),
        probes=(Probe("stages", _MHEAD, Steps((30, 60), gamma=0.1)),),
        run=RunSettings(epochs=90, precision="bf16"),
    )


def inat18_mhead() -> Linear:
    """iNaturalist 2018, 8,142 classes, ResNet-50: a linear classifier on each of the five stages.

    Source: mmselfsup 0.x, resnet50_mhead_8xb32-steplr-84e_inat18.py: as `in1k_mhead` without color
    jitter, x0.1 at 24, 48 and 72, 84 epochs (1.x names these values, but runs others). bf16
    backbone (ours); --run.precision fp32 as published.
    VISSL (eval_resnet_8gpu_transfer_inaturalist18_linear.yaml), except its head on the average of
    res5 and torch's default initialisation of linear layers: --probes.0.affine
    --probes.0.optim.weight-decay 5e-4 --probes.0.optim.decay-rule no_norm
    Command: torchrun --nproc-per-node 8 scripts/evaluate.py inat18_mhead --weights FILE
    (without conversion: --train.data inaturalist:train2018.json --train.root FOLDER; same for val)
    Published: nothing for rotation prediction.
    """
    return replace(
        _large("inat18_mhead", "inat18", crop=RandomResizedCrop(224)),
        probes=(Probe("stages", _MHEAD, Steps((24, 48, 72), gamma=0.1)),),
        run=RunSettings(epochs=84, precision="bf16"),
    )


def places205_mhead() -> Linear:
    """Places205, ResNet-50: a linear classifier on each of the five stages.

    Source: mmselfsup 0.x, resnet50_mhead_8xb32-steplr-28e_places205.py: as `in1k_mhead` without
    color jitter, short side 256 and a random crop of 224, x0.1 at 7, 14 and 21, 28 epochs. bf16
    backbone (ours); --run.precision fp32 as published. Theirs first takes the center 256 x 256,
    which is the whole image in the 256 x 256 release.
    VISSL's variant, with other crops, is `places205_mhead_vissl`.
    Command: torchrun --nproc-per-node 8 scripts/evaluate.py places205_mhead --weights FILE
    (without conversion: --train.data train_places205.csv --train.root FOLDER; same for val)
    Published (mmselfsup), feature 1-5: 18.94 / 34.72 / 44.53 / 46.30 / 44.12.
    """
    return replace(
        _large("places205_mhead", "places205", crop=RandomCrop(224, padding=0, resize=256)),
        probes=(Probe("stages", _MHEAD, Steps((7, 14, 21), gamma=0.1)),),
        run=RunSettings(epochs=28, precision="bf16"),
    )


def places205_mhead_vissl() -> Linear:
    """Places205, ResNet-50, VISSL's variant of `places205_mhead`: random-size crops, 14 epochs.

    Source: VISSL, eval_resnet_8gpu_transfer_places205_linear.yaml: as `places205_mhead`, but
    x0.1 at 4, 8 and 12, decay 5e-4 without norms, and affine batch norm. bf16 backbone (ours);
    --run.precision fp32 as published. VISSL uses torch's default initialisation of linear layers;
    ours is N(0, 0.01).
    Command: torchrun --nproc-per-node 8 scripts/evaluate.py places205_mhead_vissl --weights FILE
    Published: nothing per stage for rotation prediction.
    """
    base = places205_mhead()
    optim = replace(_MHEAD, weight_decay=5e-4, decay_rule="no_norm")
    return replace(
        base,
        name="places205_mhead_vissl",
        train=replace(base.train, crop=RandomResizedCrop(224)),
        probes=(Probe("stages", optim, Steps((4, 8, 12), gamma=0.1), affine=True),),
        run=replace(base.run, epochs=14),
    )


def _cifar10(name: str, backbone: BackboneName, batch_size: int) -> Linear:
    """CIFAR-10 with padded random crops; the caller sets probes and length."""
    plain, val = cifar10_data()
    train = replace(
        plain,
        batch_size=batch_size,
        crop=RandomCrop(32, padding=4),
        flip=True,
        shuffle=True,
        drop_last=True,
    )
    return Linear(name=name, backbone=backbone, train=train, val=val)


def cifar10_probes() -> Linear:
    """CIFAR-10: the RotNet authors' conv and non-linear probes, and linear ones, of all NIN blocks.

    Source: gidariss/FeatureLearningRotNet, config/CIFAR10_ConvClassifier_on_RotNet_NIN4blocks_
    Conv2_feats.py and CIFAR10_MultLayerClassifier_...py: 128 images, nesterov, decay 5e-4, 100
    epochs, 0.1 / 0.02 / 0.004 / 0.0008, changed at 35, 70, 85 (conv) and 20, 40, 45 (non-linear).
    The linear probe has the conv probe's schedule (ours). They report the best test epoch; we
    report the last one. bf16 backbone (ours); --run.precision fp32 as published.
    Command: torchrun --nproc-per-node 1 scripts/evaluate.py cifar10_probes --weights FILE
    Published: conv2: 89.06 (non-linear), 91.16 (conv).
    """
    base = _cifar10("cifar10_probes", rotnet_cifar10_nin().backbone, 128)
    optim = Optim(lr=0.1, nesterov=True, weight_decay=5e-4)
    rates = (0.1, 0.02, 0.004, 0.0008)
    conv = Table(tuple(zip((35, 70, 85, 100), rates, strict=True)))
    hidden = Table(tuple(zip((20, 40, 45, 100), rates, strict=True)))
    return replace(
        base,
        probes=(
            Probe("conv", optim, conv),
            Probe("nonlinear", optim, hidden),
            Probe("stages", optim, conv),
        ),
        run=RunSettings(epochs=100, precision="bf16"),
    )


def cifar10_linear() -> Linear:
    """CIFAR-10, small ResNet-18, two CPU cores: linear probes of all stages and the average pool.

    Source: our own schedule; probes as `in1k_linear` and `in1k_mhead`.
    Command: torchrun --nproc-per-node 2 scripts/evaluate.py cifar10_linear --weights FILE
    Measured: docs/results/rotnet_cifar10_r18.
    """
    optim = Optim(lr=0.02, nesterov=True, weight_decay=1e-4)
    base = _cifar10("cifar10_linear", rotnet_cifar10_r18().backbone, 64)
    return replace(
        base,
        probes=(
            Probe("avgpool", replace(optim, lr=0.2, weight_decay=0.0), Triangle(warmup=0.1)),
            Probe("stages", optim, Triangle(warmup=0.1)),
        ),
        eval_every_epochs=100,
        run=RunSettings(epochs=4, precision="fp32", log_every_steps=50),
    )


def quickstart_linear() -> Linear:
    """Scanned digits: linear evaluation of the network that `quickstart` trains; part of the demo.

    Source: our own schedule; probes as `cifar10_linear`. Only 200 labels: with all 1,437 the
    digits are so easy that features of random weights do about as well.
    Command: torchrun --nproc-per-node 1 scripts/evaluate.py quickstart_linear --weights FILE
    """
    base, pretext = cifar10_linear(), quickstart()
    assert pretext.val is not None
    return replace(
        base,
        name="quickstart_linear",
        backbone=pretext.backbone,
        train=replace(pretext.train, views="plain", batch_size=25, max_samples=200),
        val=replace(pretext.val, views="plain"),
        run=RunSettings(epochs=20, precision="fp32", log_every_steps=20),
    )


RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        in1k_linear,
        in1k_mhead,
        inat18_mhead,
        places205_mhead,
        places205_mhead_vissl,
        cifar10_probes,
        cifar10_linear,
        quickstart_linear,
    )
}
