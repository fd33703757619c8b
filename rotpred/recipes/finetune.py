"""Semi-supervised recipes. Each docstring: source, command, published result."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from pipelines.checks import DISTINCT, NOT_EMPTY, Fraction, PositiveFloat, PositiveInt
from pipelines.spec import CIFAR10, CenterCrop, LoaderSpec, RandomCrop, RandomResizedCrop
from rotpred.recipes.base import PLAIN, FromWeights, Trained
from rotpred.recipes.pretrain import rotnet_cifar10_r18
from rotpred.training.schedule import Schedule, Steps
from rotpred.training.settings import Optim, RunSettings


@dataclass(frozen=True)
class FineTuning(Trained, FromWeights):
    """Fine-tuning of all layers, with a new classifier, on a fraction of the labels."""

    name: str = "semi"
    fraction: Fraction = 0.01
    """Fraction of the labels in the training data. Reported in the results; selects nothing."""
    train: LoaderSpec = field(default_factory=lambda: LoaderSpec(views="plain"))
    """Labelled training data."""
    val: LoaderSpec = PLAIN
    """Labelled validation data."""
    optim: Optim = field(default_factory=lambda: Optim(lr=0.01, weight_decay=5e-4))
    """Optimiser of the backbone."""
    head_lr_mult: PositiveFloat = 1.0
    """Learning rate of the classifier, relative to the backbone's."""
    schedule: Schedule = field(default_factory=lambda: Steps((12, 16), gamma=0.2))
    """Learning rate over time."""
    deterministic: bool = True
    """Use deterministic kernels only: the same command gives the same weights, also on a GPU."""
    grid: bool = False
    """Train every pair of `lrs` and `head_lr_mults`, each in its own folder below the run folder.
    Report all, and the best on the validation data, as published. The same command again resumes
    the unfinished ones."""
    lrs: Annotated[tuple[PositiveFloat, ...], NOT_EMPTY, DISTINCT] = (0.1, 0.01, 0.001)
    """Learning rates of the grid; replace optim.lr."""
    head_lr_mults: Annotated[tuple[PositiveFloat, ...], NOT_EMPTY, DISTINCT] = (1.0, 10.0, 100.0)
    """Multiples of the grid; replace head_lr_mult."""
    eval_every_epochs: PositiveInt = 20
    run: RunSettings = field(default_factory=lambda: RunSettings(epochs=20, precision="fp32"))


def in1k_semi(fraction: float = 0.01, lr: float = 0.01, head_lr_mult: float = 100.0) -> FineTuning:
    """ImageNet-1k, ResNet-50 fine-tuned on 1 % or 10 % of the labels, 4 GPUs x 64 images.

    Args:
        fraction: 0.01 or 0.1; each has its own weight decay.
        lr: Learning rate of the backbone for 256 images a step.
        head_lr_mult: Learning rate of the classifier, relative to the backbone's.

    Raises:
        ValueError: The fraction is neither 0.01 nor 0.1.
    """
    decays = {0.01: 5e-4, 0.1: 1e-4}
    if fraction not in decays:
        raise ValueError(f"fraction must be 0.01 or 0.1, got {fraction}")
    percent, decay = round(100 * fraction), decays[fraction]
    return FineTuning(
        name=f"in1k_semi_{percent}",
        fraction=fraction,
        train=LoaderSpec(
            data=f"data/imagenet/train_{percent}percent.beton",
            batch_size=64,
            crop=RandomResizedCrop(224),
            views="plain",
        ),
        val=replace(
            PLAIN, data="data/imagenet/val.beton", batch_size=128, crop=CenterCrop(224, 256)
        ),
        optim=Optim(lr=lr, weight_decay=decay, reference_batch=256),
        head_lr_mult=head_lr_mult,
        sync_bn="torch",
    )


def in1k_semi_1() -> FineTuning:
    """ImageNet-1k, ResNet-50 fine-tuned on 1 % of the labels.

    Source: mmselfsup, configs/benchmarks/classification/imagenet/imagenet_1percent; OpenSelfSup:
    4 x 64 images, SGD 0.9, 20 epochs, x0.2 at 12 and 16, decay 5e-4, SyncBN, random crop and flip;
    a grid of learning rates 0.1, 0.01, 0.001 and head multiples 1, 10, 100; deterministic. The
    default is the pair that was best for rotation there. VISSL: 70 epochs, one rate, no decay.
    Command: torchrun --nproc-per-node 4 scripts/evaluate.py in1k_semi_1 --grid --weights FILE
    (without conversion: --train.data imagenet-subset:1percent.txt --train.root TRAIN_FOLDER, with
    SimCLR's list; for a list with labels: --train.data LIST --train.root TRAIN_FOLDER)
    Published (OpenSelfSup), top-1 / top-5: 18.98 / 44.05; random weights 1.56 / 4.99.
    """
    return in1k_semi(0.01)


def in1k_semi_10() -> FineTuning:
    """ImageNet-1k, ResNet-50 fine-tuned on 10 % of the labels.

    Source: as `in1k_semi_1`, imagenet_10percent: decay 1e-4.
    Command: torchrun --nproc-per-node 4 scripts/evaluate.py in1k_semi_10 --grid --weights FILE
    Published (OpenSelfSup), top-1 / top-5: 54.75 / 80.21; random weights 21.78 / 44.24.
    """
    return in1k_semi(0.1)


def _cifar10(percent: int, epochs: int, decay: float) -> FineTuning:
    """ResNet-18 on CIFAR-10, 50 images a step."""
    pretext = rotnet_cifar10_r18()
    assert pretext.val is not None
    plain = replace(pretext.train, views="plain", normalize=CIFAR10)
    return FineTuning(
        name=f"cifar10_semi_{percent}",
        backbone=pretext.backbone,
        fraction=percent / 100,
        # CIFAR-10 has 5,000 training images of each class.
        train=replace(
            plain, batch_size=50, crop=RandomCrop(32, padding=4), samples_per_class=50 * percent
        ),
        val=replace(pretext.val, views="plain"),
        optim=Optim(lr=0.01, weight_decay=decay),
        head_lr_mult=10.0,
        schedule=Steps((0.6 * epochs, 0.8 * epochs), gamma=0.2),
        eval_every_epochs=epochs,
        run=RunSettings(epochs=epochs, precision="fp32", log_every_steps=20, keep_checkpoints=2),
    )


def cifar10_semi_1() -> FineTuning:
    """CIFAR-10, the small ResNet-18 fine-tuned on 1 % of the labels: 50 of each class.

    Source: `in1k_semi_1`, scaled down for two CPU cores: 50 images a step, 30 epochs of ten steps.
    One process, because exchanging gradients between two costs more than such small batches save.
    Command: torchrun --nproc-per-node 1 scripts/evaluate.py cifar10_semi_1 --grid --weights FILE
    """
    return _cifar10(1, 30, 5e-4)


def cifar10_semi_10() -> FineTuning:
    """CIFAR-10, the small ResNet-18 fine-tuned on 10 % of the labels: 500 of each class.

    Source: `in1k_semi_10`, scaled down for two CPU cores: 50 images a step, 8 epochs of 100 steps.
    Command: torchrun --nproc-per-node 1 scripts/evaluate.py cifar10_semi_10 --grid --weights FILE
    """
    return _cifar10(10, 8, 1e-4)


RECIPES = {
    recipe.__name__: recipe
    for recipe in (in1k_semi_1, in1k_semi_10, cifar10_semi_1, cifar10_semi_10)
}
