"""Segmentation recipes. Each docstring: source, command, published result."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pipelines.checks import NonEmptyStr, NonNegativeFloat, PositiveInt, at_least, below
from pipelines.dense.spec import DenseSpec, FitWithin, RatioCrop
from rotpred.recipes.base import FromWeights, Trained
from rotpred.training.schedule import Poly, Schedule
from rotpred.training.settings import Optim, RunSettings, SyncBn


@dataclass(frozen=True)
class Segmentation(Trained, FromWeights):
    """Training of a fully convolutional network on a pretrained backbone, all layers."""

    name: str = "segmentation"
    train: DenseSpec = field(
        default_factory=lambda: DenseSpec(
            data="vocseg:2012/train+2012/aug", batch_size=4, geometry=RatioCrop(512, 2048, 512),
            photometric=True, divisor=1, steps_per_epoch=2000,
        )
    )  # fmt: skip
    """Training data."""
    val: DenseSpec = field(
        default_factory=lambda: DenseSpec(
            data="vocseg:2012/val", batch_size=1, geometry=FitWithin(2048, 512), flip=False,
            divisor=1, train=False,
        )
    )  # fmt: skip
    """Validation data."""
    optim: Optim = field(
        default_factory=lambda: Optim(lr=0.01, weight_decay=5e-4, reference_batch=16)
    )
    """Optimiser of the whole network."""
    schedule: Schedule = field(default_factory=lambda: Poly(power=0.9, final=0.01))
    """Learning rate over time."""
    sync_bn: SyncBn = "torch"
    align_corners: bool = False
    """How logits are upsampled, in training and test: keep the centres of the corner pixels in
    place if true, the image edges if false."""
    aux_weight: NonNegativeFloat = 0.4
    """Weight of the auxiliary head's loss, on res4. The main head has weight 1."""
    dropout: Annotated[float, at_least(0), below(1)] = 0.1
    """Probability of dropping a channel before each of the two classifiers."""
    test: Literal["whole", "slide"] = "whole"
    """Validate on whole images, or average the logits of sliding windows."""
    slide_crop: PositiveInt = 769
    """Side of the sliding window in pixels."""
    slide_stride: PositiveInt = 513
    """Pixels between windows. The last window ends at the edge of the image."""
    save_predictions: bool = False
    """Write the predictions of the last validation to OUT/predictions: one NAME.png of class ids
    with a palette per image, which `predictions` can read."""
    predictions: NonEmptyStr | None = None
    """Instead of training, score this folder on the validation data: PNG files of class ids, named
    NAME.png or NAME_ANYTHING.png, in the size of the images."""
    label_ids: bool = False
    """Whether those files hold Cityscapes' label ids (as for its server), not the 19 train ids."""
    run: RunSettings = field(default_factory=lambda: RunSettings(epochs=10, precision="fp32"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slide_stride > self.slide_crop:
            raise ValueError(
                "slide_stride must be at most slide_crop, or windows leave gaps, got "
                f"{self.slide_stride} and {self.slide_crop}"
            )


def voc12aug_seg() -> Segmentation:
    """VOC 2012 with SBD's masks: FCN, ResNet-50, 512 pixels, 20k iterations, 4 GPUs x 4 images.

    Source: mmselfsup, configs/benchmarks/mmsegmentation/voc12aug/fcn_r50-d8_4xb4-20k_voc12aug-
    512x512.py: SGD 0.01, momentum 0.9, decay 5e-4, poly 0.9 down to 1e-4, no warm-up, SyncBN,
    nothing frozen; scale 0.5 to 2 of (2048, 512), crop 512 with at most 75 % of one class, flip,
    photometric distortion; whole images at (2048, 512), validated every 2k iterations.
    Note: the 1.x branch inherits a ResNetV1c, whose stem differs from every pretrained backbone
    here. The published number belongs to the plain ResNet of the 0.x branch, as here.
    Command: torchrun --nproc-per-node 4 scripts/evaluate.py voc12aug_seg --weights FILE
    (published in fp32; --run.precision bf16 for mixed precision. With fewer GPUs, learning rate and
    number of steps are scaled; the log shows how.)
    Published (mmselfsup), mIoU: 64.31; supervised, V1c (mmsegmentation): 67.08.
    """
    return Segmentation(name="voc12aug_seg")


def cityscapes_seg() -> Segmentation:
    """Cityscapes: FCN, ResNet-50, 769 pixels, 40k iterations, 4 GPUs x 2 images.

    Source: mmselfsup, configs/benchmarks/mmsegmentation/cityscapes/fcn_r50-d8_4xb2-40k_cityscapes-
    769x769.py: as `voc12aug_seg`, with scale 0.5 to 2 of (2049, 1025), crop 769, align_corners in
    both heads; windows of 769 every 513 pixels at (2049, 1025), validated every 4k iterations.
    Note: plain ResNet, as `voc12aug_seg`. 769 is 8 * 96 + 1: with align_corners the 97 logits of a
    side lie on every eighth pixel, so change both or neither.
    Command: torchrun --nproc-per-node 4 scripts/evaluate.py cityscapes_seg --weights FILE
    Published: none for rotation; supervised, V1c (mmsegmentation), mIoU: 71.47.
    """
    base = Segmentation()
    root = "data/cityscapes"
    return replace(
        base,
        name="cityscapes_seg",
        train=replace(
            base.train, data="cityscapes:train", root=root, batch_size=2,
            geometry=RatioCrop(769, 2049, 1025), steps_per_epoch=4000,
        ),
        val=replace(base.val, data="cityscapes:val", root=root, geometry=FitWithin(2049, 1025)),
        optim=replace(base.optim, reference_batch=8),
        align_corners=True,
        test="slide",
    )  # fmt: skip


RECIPES = {recipe.__name__: recipe for recipe in (voc12aug_seg, cityscapes_seg)}
