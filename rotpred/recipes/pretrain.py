"""Pretraining recipes. Each docstring: source, command, published result."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pipelines.spec import (
    CIFAR10,
    CenterCrop,
    LoaderSpec,
    RandomCrop,
    RandomResizedCrop,
)
from rotpred.models.names import BackboneName
from rotpred.recipes.base import PLAIN, Trained, cifar10_data
from rotpred.training.schedule import Schedule, Steps, Table, Triangle
from rotpred.training.settings import Optim, RunSettings


def rotnet_in1k_r50() -> Pretrain:
    """ResNet-50 on ImageNet-1k, as in mmselfsup: 8 GPUs x 16 images, 70 epochs, SyncBN.

    Source: open-mmlab/mmselfsup, rotation-pred_resnet50_8xb16-steplr-70e_in1k.py. SGD 0.2 for 128
    images a step, warm-up over 5 epochs from a tenth of that, x0.1 at 30 and 50.
    Command: torchrun --nproc-per-node 8 scripts/pretrain.py rotnet_in1k_r50
    Published: ImageNet linear top-1 47.0 (average pool), 54.20 (res4).
    """
    data = "data/imagenet/{}.beton"
    return Pretrain(
        name="rotnet_in1k_r50",
        backbone="resnet50",
        train=LoaderSpec(data=data.format("train"), batch_size=16, crop=RandomResizedCrop(224)),
        val=replace(
            PLAIN,
            data=data.format("val"),
            batch_size=64,
            crop=CenterCrop(224, 256),
            views="rotate4",
        ),
        optim=Optim(lr=0.2, momentum=0.9, weight_decay=1e-4, reference_batch=128),
        schedule=Steps((30, 50), gamma=0.1, warmup_epochs=5, warmup_start_factor=0.1),
        sync_bn="torch",
        eval_every_epochs=10,
        run=RunSettings(epochs=70, precision="fp32"),
    )


def rotnet_in1k_r50_amp() -> Pretrain:
    """`rotnet_in1k_r50` in mixed precision: bf16 autocast.

    Source: mmselfsup's rotation-pred_resnet50_8xb16-amp-steplr-70e_in1k.py. It uses fp16 with loss
    scaling, which bf16 does not need; --run.precision fp16 as published. SyncBN cannot be compiled;
    --sync-bn off --run.compile uses the statistics of each GPU's own 64 views instead.
    Command: torchrun --nproc-per-node 8 scripts/pretrain.py rotnet_in1k_r50_amp
    """
    base = rotnet_in1k_r50()
    return replace(
        base,
        name="rotnet_in1k_r50_amp",
        run=replace(base.run, precision="bf16"),
    )


def rotnet_in1k_r50_fast() -> Pretrain:
    """`rotnet_in1k_r50` in half the epochs, small images first: 8 GPUs x 128 images, 35 epochs.

    Source: our own. Images of 128 pixels, 192 from epoch 14 and 224 from epoch 28, as
    libffcv/ffcv-imagenet grows them from 160 to 192: the pixels of 22 epochs instead of 70. The
    learning rate per image is that of rotnet_in1k_r50: 1.6 for 1,024 images or 4,096 views (0.1 for
    256 views, which Goyal et al. 2017 scale to 8,192 with warm-up). It rises for a seventh of the
    run, then falls linearly to zero. No SyncBN: each GPU has 512 views for its statistics.
    Validation at 224 pixels.
    Command: torchrun --nproc-per-node 8 scripts/pretrain.py rotnet_in1k_r50_fast
    Neither its accuracy nor its speed has been measured.
    """
    base = rotnet_in1k_r50()
    return replace(
        base,
        name="rotnet_in1k_r50_fast",
        train=replace(
            base.train, batch_size=128, resolution_schedule=((0, 128), (14, 192), (28, 224))
        ),
        schedule=Triangle(warmup=1 / 7),
        sync_bn="off",
        eval_every_epochs=7,
        run=RunSettings(epochs=35, precision="bf16", compile=True),
    )


def rotnet_in1k_alexnet() -> Pretrain:
    """AlexNet with batch norm on ImageNet-1k, as in the RotNet authors' code.

    Source: gidariss/FeatureLearningRotNet, config/ImageNet_RotNet_AlexNet.py: 192 images on one
    GPU, 50 epochs; the effective learning rates are 0.01, 1e-3, 1e-4, 1e-5 with changes at 15, 30
    and 45 (the file's nominal 0.1 is overwritten before the first step).
    Command: torchrun --nproc-per-node 1 scripts/pretrain.py rotnet_in1k_alexnet
    Published: rotation accuracy about 89 % on the validation set.
    """
    base = rotnet_in1k_r50()
    return replace(
        base,
        name="rotnet_in1k_alexnet",
        backbone="alexnet",
        train=replace(base.train, batch_size=192),
        optim=Optim(lr=0.01, nesterov=True, weight_decay=5e-4),
        schedule=Table(((15, 0.01), (30, 1e-3), (45, 1e-4), (50, 1e-5))),
        sync_bn="off",
        run=RunSettings(epochs=50, precision="fp32"),
    )


def _cifar10(name: str, backbone: BackboneName, *, batch_size: int) -> Pretrain:
    """CIFAR-10 with padded random crops; the caller sets optimiser and length."""
    data = "data/cifar10/{}.beton"
    return Pretrain(
        name=name,
        backbone=backbone,
        train=LoaderSpec(
            data=data.format("train"),
            batch_size=batch_size,
            crop=RandomCrop(32, padding=4),
            normalize=CIFAR10,
        ),
        val=replace(cifar10_data()[1], views="rotate4"),
    )


def rotnet_cifar10_nin() -> Pretrain:
    """Network in Network with 4 blocks on CIFAR-10: the paper's own experiment.

    Source: gidariss/FeatureLearningRotNet, config/CIFAR10_RotNet_NIN4blocks.py: 128 images on one
    GPU, 200 epochs, 0.1 / 0.02 / 0.004 / 0.0008 with changes at 60, 120 and 160.
    Command: torchrun --nproc-per-node 1 scripts/pretrain.py rotnet_cifar10_nin
    (--backbone nin3 or nin5 for the others)
    Published: rotation accuracy 93.65 (a rerun of the code); probes of conv2 89.06 and 91.16.
    """
    return replace(
        _cifar10("rotnet_cifar10_nin", "nin4", batch_size=128),
        optim=Optim(lr=0.1, nesterov=True, weight_decay=5e-4),
        schedule=Table(((60, 0.1), (120, 0.02), (160, 0.004), (200, 0.0008))),
        eval_every_epochs=5,
        run=RunSettings(epochs=200, precision="bf16", save_every_steps=100_000),
    )


def rotnet_cifar10_r18() -> Pretrain:
    """ResNet-18 with a small stem on CIFAR-10, for machines without a GPU.

    Source: our own. The stem is 3x3 with stride 2 and a max pool; an epoch of 50,000 images takes
    about 15 minutes on two cores. Two epochs cannot overfit, so crops are not padded (for long
    runs: --train.crop.padding 4). The learning rate rises for a sixth of the run, then falls
    linearly to zero.
    Command: torchrun --nproc-per-node 2 scripts/pretrain.py rotnet_cifar10_r18
    Measured: docs/results/rotnet_cifar10_r18.
    """
    base = _cifar10("rotnet_cifar10_r18", "resnet18_tiny", batch_size=32)
    return replace(
        base,
        train=replace(base.train, crop=RandomCrop(32, padding=0)),
        optim=Optim(lr=0.1, nesterov=True, weight_decay=5e-4, decay_rule="no_norm_no_bias"),
        schedule=Triangle(warmup=1 / 6),
        run=RunSettings(epochs=2, precision="fp32", log_every_steps=50, save_every_steps=500),
    )


def quickstart() -> Pretrain:
    """Scanned digits (scikit-learn's 1,797 real images): the demo, two minutes on two cores.

    Source: our own. A few hundred steps suffice to tell rotated digits from upright ones. 0 and 8
    look the same when rotated by 180 degrees, so no network reaches 100 %. No flip: digits are
    not mirror-symmetric.
    Command: torchrun --nproc-per-node 2 scripts/pretrain.py quickstart
    """
    data = "data/digits/{}.beton"
    return Pretrain(
        name="quickstart",
        backbone="resnet18_tiny",
        train=LoaderSpec(
            data=data.format("train"),
            batch_size=32,
            crop=RandomCrop(32, padding=4),
            flip=False,
            normalize=CIFAR10,
        ),
        val=replace(cifar10_data()[1], data=data.format("val"), batch_size=60, views="rotate4"),
        optim=Optim(lr=0.03, nesterov=True, weight_decay=5e-4, decay_rule="no_norm_no_bias"),
        schedule=Triangle(warmup=0.2),
        eval_every_epochs=2,
        run=RunSettings(epochs=3, precision="fp32", log_every_steps=10, save_every_steps=200),
    )


RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        rotnet_in1k_r50,
        rotnet_in1k_r50_amp,
        rotnet_in1k_r50_fast,
        rotnet_in1k_alexnet,
        rotnet_cifar10_nin,
        rotnet_cifar10_r18,
        quickstart,
    )
}


@dataclass(frozen=True)
class Pretrain(Trained):
    """Pretraining by rotation prediction."""

    name: str = "pretrain"
    backbone: BackboneName = "resnet50"
    """resnet50, resnet18, resnet18_small, resnet18_tiny, alexnet, nin3, nin4 or nin5."""
    train: LoaderSpec = field(default_factory=LoaderSpec)
    """Training data."""
    val: LoaderSpec | None = None
    """Validation data: all images, four views each. None (only in Python): no validation."""
    optim: Optim = field(default_factory=Optim)
    """Optimiser."""
    schedule: Schedule = field(default_factory=Steps)
    """Learning rate over time."""
