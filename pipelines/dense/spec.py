"""Options of the data loader for detection and segmentation.

The counterpart of `pipelines.spec` for images of variable size with boxes or masks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated

from pipelines.checks import (
    NOT_EMPTY,
    ORDERED,
    Checked,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
)
from pipelines.spec import IMAGENET, Normalize


@dataclass(frozen=True)
class ShortSide(Checked):
    """Resize the short side to one of several lengths, keeping the aspect ratio; for detection."""

    lengths: Annotated[tuple[PositiveInt, ...], NOT_EMPTY] = (800,)
    """Lengths in pixels. One is drawn per sample."""
    longest: PositiveInt = 1333
    """Largest long side in pixels. A longer one shrinks the image further."""


@dataclass(frozen=True)
class FitWithin(Checked):
    """Resize the image to the largest size that fits a frame, keeping the aspect ratio.

    The frame has the orientation of the image.
    """

    long: PositiveInt = 2048
    """Long side of the frame in pixels."""
    short: PositiveInt = 512
    """Short side of the frame in pixels."""


@dataclass(frozen=True)
class RatioCrop(Checked):
    """`FitWithin` a frame scaled by a random ratio, then a random square crop; for segmentation.

    If one class covers more than `most` of the pixels that count, the crop is drawn again, up to
    ten times. Images smaller than the crop are padded to the right and below: with 0 after
    normalisation, with `IGNORED` in the mask.
    """

    size: PositiveInt = 512
    """Side of the crop in pixels."""
    long: PositiveInt = 2048
    """Long side of the unscaled frame in pixels."""
    short: PositiveInt = 512
    """Short side of the unscaled frame in pixels."""
    ratio: Annotated[tuple[PositiveFloat, PositiveFloat], ORDERED] = (0.5, 2.0)
    """Range of the random factor of both sides of the frame."""
    most: Fraction = 0.75
    """Largest share of the pixels that one class may cover."""


Geometry = ShortSide | FitWithin | RatioCrop

_NOT_PIXELS = (
    "data", "root", "batch_size", "masks", "max_invalid_annotations", "workers", "timeout",
)  # fmt: skip


@dataclass(frozen=True)
class DenseSpec(Checked):
    """All options of a dense loader. Paths are relative to the working directory."""

    data: str = "voc:2007/trainval+2012/trainval"
    """FORMAT:PARTS. voc:DIR/LIST+... has boxes, vocseg:DIR/LIST+... has masks (DIR 2007 means the
    folder VOC2007; LIST is a file in ImageSets/Main or ImageSets/Segmentation). coco:NAME has boxes
    and masks of objects (annotations/instances_NAME.json). cityscapes:SPLIT has masks."""
    root: str = "data/VOCdevkit"
    """Folder of the data set."""
    classes: tuple[str, ...] = ()
    """Class names for voc and vocseg data. Empty: VOC's 20 classes."""
    batch_size: PositiveInt = 2
    """Images per process and step."""
    geometry: Geometry = field(default_factory=ShortSide)
    """Resize and crop."""
    flip: bool = True
    """Flip horizontally with probability 0.5."""
    photometric: bool = False
    """Random brightness, contrast, saturation and hue (SSD's distortion, as in mmsegmentation)."""
    normalize: Normalize = IMAGENET
    """Mean and standard deviation of each channel. Applied on the device."""
    divisor: PositiveInt = 32
    """Batches are padded, to the right and below, to multiples of this many pixels."""
    keep_difficult: bool = True
    """Train on boxes marked difficult, as detectron2 does. mmdetection ignores them."""
    keep_empty: bool = False
    """Train on images without any box to train on. Evaluation reads every image."""
    masks: bool = True
    """For coco data, load the masks of objects besides their boxes. Without masks training is
    cheaper; images and boxes are the same. Detectors without a mask head never load them."""
    train: bool = True
    """Endless shuffled order, grouped by aspect ratio. False: every image once, in order."""
    steps_per_epoch: PositiveInt | None = None
    """Steps per epoch of training. None: as many as one pass over the data takes."""
    max_samples: PositiveInt | None = None
    """Use only the first images, this many."""
    seed: Seed = 0
    """Seed of order and augmentation."""
    max_invalid_annotations: NonNegativeInt = 0
    """Invalid annotations to tolerate (no area, outside the image, unknown class, missing image).
    They are left out with a warning. One more is an error."""
    workers: NonNegativeInt = 0
    """Loading threads per process. 0: divide the available cores among the local processes."""
    timeout: PositiveFloat = 300.0
    """Seconds to wait for a batch before an error."""

    @property
    def view_count(self) -> int:
        """Views emitted per image."""
        return 1

    @property
    def drop_last(self) -> bool:
        """Whether all batches are full, without padding."""
        return self.train

    def scalars(self, _epoch: int, /) -> dict[str, float]:
        """Return values to log for an epoch, besides the losses: none."""
        return {}

    def fingerprint_fields(self) -> dict[str, object]:
        """Return the fields that decide which pixels come in which order, as plain data.

        The data set itself is not included.
        """
        fields = asdict(self) | {
            "geometry": {"kind": type(self.geometry).__name__, **asdict(self.geometry)}
        }
        return {name: value for name, value in fields.items() if name not in _NOT_PIXELS}
