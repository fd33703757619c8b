"""Recipes of classification with a frozen trunk: source, command and published result of each."""

from __future__ import annotations

from dataclasses import replace

from pipelines.spec import CIFAR10, CenterCrop, LoaderSpec, RandomCrop, RandomResizedCrop
from rotpred.optim import Optim
from rotpred.recipes import Linear, Probe, Run
from rotpred.recipes.pretrain import quickstart, rotnet_cifar10_nin, rotnet_cifar10_r18
from rotpred.schedule import Steps, Table, Triangle


def in1k_linear() -> Linear:
    """ImageNet-1k, ResNet-50: the average-pool classifier and all five stages, in one pass.

    Source: the average pool as MoCo's main_lincls.py and mmselfsup's resnet50_linear-8xb32-steplr-
    100e_in1k.py (rate 30, no decay, x0.1 at 60 and 80, 100 epochs); the stages as mmselfsup 0.x's
    resnet50_mhead_linear-8xb32-steplr-90e_in1k.py (rate 0.01, nesterov, decay 1e-4, x0.1 at 30 and
    60, pools of mmselfsup/models/utils/multi_pooling.py), here over 100 epochs and with this
    recipe's crop and flip only. Rates belong to 256 images a step.
    Command: torchrun --nproc-per-node 8 scripts/evaluate.py in1k_linear --weights FILE
    Published (mmselfsup): 47.0; feature 1-5: 12.15 / 31.99 / 44.57 / 54.20 / 45.94.
    """
    data = "data/imagenet/{}.beton"
    plain = LoaderSpec(data=data.format("train"), batch_size=32, views="plain")
    return Linear(
        name="in1k_linear",
        backbone="resnet50",
        train=replace(plain, crop=RandomResizedCrop(224)),
        val=replace(
            plain,
            data=data.format("val"),
            batch_size=128,
            crop=CenterCrop(224, 256),
            flip=False,
            shuffle=False,
            drop_last=False,
        ),
        probes=(
            Probe(
                "avgpool",
                Optim(lr=30.0, weight_decay=0.0, reference_batch=256),
                Steps((60, 80), gamma=0.1),
            ),
            Probe(
                "stages",
                Optim(lr=0.01, nesterov=True, weight_decay=1e-4, reference_batch=256),
                Steps((30, 60), gamma=0.1),
            ),
        ),
        run=Run(epochs=100, precision="bf16"),
    )


def _cifar10(name: str, backbone: str, batch_size: int) -> Linear:
    data = "data/cifar10/{}.beton"
    plain = LoaderSpec(
        data=data.format("train"), batch_size=batch_size, views="plain", normalize=CIFAR10
    )
    return Linear(
        name=name,
        backbone=backbone,
        train=replace(plain, crop=RandomCrop(32, padding=4)),
        val=replace(
            plain,
            data=data.format("test"),
            batch_size=250,
            crop=CenterCrop(32, None),
            flip=False,
            shuffle=False,
            drop_last=False,
        ),
    )


def cifar10_probes() -> Linear:
    """CIFAR-10 probes of every NIN block: the RotNet authors' conv and non-linear ones, and linear.

    Source: gidariss/FeatureLearningRotNet, config/CIFAR10_ConvClassifier_on_RotNet_NIN4blocks_
    Conv2_feats.py and CIFAR10_MultLayerClassifier_...py: 128 images, nesterov, decay 5e-4, 100
    epochs, 0.1 / 0.02 / 0.004 / 0.0008, changed at 35, 70, 85 (conv) and 20, 40, 45 (non-linear).
    The linear probe shares the conv probe's schedule (ours). Theirs keeps the best test epoch; we
    report the last one.
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
        run=Run(epochs=100, precision="bf16"),
    )


def cifar10_linear() -> Linear:
    """CIFAR-10, all stages and the average pool of the small ResNet-18, for two CPU cores.

    Source: our own schedule; probes as `in1k_linear`.
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
        eval_every=100,
        run=Run(epochs=4, precision="fp32", log_every=50),
    )


def quickstart_linear() -> Linear:
    """Scanned digits: the demo's evaluation, on the network that `quickstart` trains.

    Source: our own schedule; probes as `in1k_linear`. Two hundred labels: with all 1,437 the digits
    are so easy that features of random weights do about as well.
    Command: torchrun --nproc-per-node 1 scripts/evaluate.py quickstart_linear --weights FILE
    """
    base, pretext = cifar10_linear(), quickstart()
    assert pretext.val is not None
    return replace(
        base,
        name="quickstart_linear",
        backbone=pretext.backbone,
        train=replace(pretext.train, views="plain", batch_size=25, limit=200),
        val=replace(pretext.val, views="plain"),
        run=Run(epochs=20, precision="fp32", log_every=20),
    )


RECIPES = {
    recipe.__name__: recipe
    for recipe in (in1k_linear, cifar10_probes, cifar10_linear, quickstart_linear)
}
