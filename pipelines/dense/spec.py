"""What to load for detection and segmentation, and the batches that come of it.

The counterpart of `spec` and `batch` for images of variable size with boxes or masks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from pipelines.spec import IMAGENET, Normalize


@dataclass(frozen=True)
class ShortSide:
    """The short side is resized to one of some lengths, the long one follows; for detection."""

    lengths: tuple[int, ...] = (800,)
    """In pixels; one is drawn for every sample."""
    longest: int = 1333
    """Pixels that the long side may have; a longer one shrinks the image further."""


@dataclass(frozen=True)
class FitWithin:
    """The image is resized, in its own ratio, to the largest that lies within a frame.

    The frame lies along the image: its long side along the image's.
    """

    long: int = 2048
    short: int = 512


@dataclass(frozen=True)
class RatioCrop:
    """`FitWithin` a frame that is scaled by a random ratio, then a square cut out; for segmentation.

    A crop of which one class covers more than `most` of all pixels that count is drawn again, up to
    ten times. Images smaller than the crop are padded, right and below: 0 after normalisation,
    `IGNORED` in the mask.
    """

    size: int = 512
    """Side of the crop in pixels."""
    long: int = 2048
    short: int = 512
    ratio: tuple[float, float] = (0.5, 2.0)
    """Range of the factor of both sides of the frame."""
    most: float = 0.75
    """Share of the pixels that one class may have."""


Geometry = ShortSide | FitWithin | RatioCrop


@dataclass(frozen=True)
class DenseSpec:
    """What to load and how. Paths are relative to the working directory."""

    data: str = "voc:2007/trainval+2012/trainval"
    """FORMAT:PARTS. voc:DIR/LIST+... has boxes, vocseg:DIR/LIST+... masks (DIR 2007 stands for the
    folder VOC2007, other names for themselves; LIST lies in ImageSets/Main or Segmentation);
    coco:NAME boxes and masks of objects (annotations/instances_NAME.json); cityscapes:SPLIT
    masks."""
    root: str = "data/VOCdevkit"
    """The data set's own folder."""
    classes: tuple[str, ...] = ()
    """Class names for voc and vocseg data of other classes than VOC's 20; empty: those."""
    batch_size: int = 2
    """Images per step and process."""
    geometry: Geometry = field(default_factory=ShortSide)
    """Sizes and crops."""
    flip: bool = True
    """Mirror left to right with probability 0.5."""
    photometric: bool = False
    """Random brightness, contrast, saturation and hue (SSD's distortion, as mmsegmentation's)."""
    normalize: Normalize = IMAGENET
    divisor: int = 32
    """Batches are padded, right and below, to multiples of so many pixels."""
    keep_difficult: bool = True
    """Train on boxes marked difficult, as detectron2 does; mmdetection ignores them."""
    keep_empty: bool = False
    """Train on images without any box to learn from. Evaluation reads every image."""
    masks: bool = True
    """Of coco data, load the objects' masks beside their boxes. Without them training is cheaper;
    images and boxes are the same. A network that learns no masks has them left out by itself."""
    train: bool = True
    """An endless shuffled order, grouped by aspect ratio; else every image once, in order."""
    steps_per_epoch: int | None = None
    """Where an epoch of training ends; None: after as many images as there are."""
    max_samples: int | None = None
    """Take the first so many images only."""
    seed: int = 0
    """Decides order and augmentation."""
    max_undecodable: int = 0
    """Annotations that are wrong (no area, outside of the image, of an unknown class, of a
    missing image) and left out with a warning; one more stops the run."""
    workers: int = 0
    """Threads that load; 0: all allowed cores, shared among the processes of a machine."""
    timeout: float = 300.0
    """Seconds to wait for a batch before giving up."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "divisor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_samples", "steps_per_epoch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.workers < 0 or self.max_undecodable < 0 or self.timeout <= 0 or self.seed < 0:
            raise ValueError(
                "workers, max_undecodable and seed must not be negative, timeout must be positive"
            )

    @property
    def view_count(self) -> int:
        """Network inputs per image."""
        return 1

    @property
    def drop_last(self) -> bool:
        """Whether every batch is full of samples, without padding."""
        return self.train

    def scalars(self, _epoch: int, /) -> dict[str, float]:
        """What the log shows beside the losses of an epoch: nothing."""
        return {}

    def fingerprint_fields(self) -> dict[str, object]:
        """Plain data: all that decides which pixels come in which order, but for the data."""
        fields = asdict(self)
        for name in (
            "data",
            "root",
            "batch_size",
            "masks",
            "max_undecodable",
            "workers",
            "timeout",
        ):
            del fields[name]
        return fields | {"geometry": {"kind": type(self.geometry).__name__, **fields["geometry"]}}
