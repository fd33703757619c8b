"""Configuration of a loader: frozen dataclasses that validate themselves."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

from pipelines.checks import (
    ORDERED,
    Checked,
    Fraction,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    at_least,
    at_most,
)

Engine = Literal["auto", "ffcv", "dali", "folder", "synthetic"]
Precision = Literal["fp32", "bf16", "fp16"]

_FINGERPRINT_FIELDS = (
    "crop", "resolution_schedule", "flip", "normalize", "shuffle", "max_samples",
    "samples_per_class", "seed", "max_undecodable", "samples",
)  # fmt: skip


@dataclass(frozen=True)
class RandomResizedCrop(Checked):
    """Crop of random area and aspect ratio, resized to a square (Inception's crop)."""

    size: PositiveInt = 224
    """Side of the output, in pixels."""
    scale: Annotated[tuple[Fraction, Fraction], ORDERED] = (0.08, 1.0)
    """Range of the crop's area, as a fraction of the image's area."""
    ratio: Annotated[tuple[PositiveFloat, PositiveFloat], ORDERED] = (3 / 4, 4 / 3)
    """Range of the crop's width / height. Its logarithm is uniformly distributed."""


@dataclass(frozen=True)
class RandomCrop(Checked):
    """Square crop at a random position, after an optional resize and black padding."""

    size: PositiveInt = 32
    """Side of the output, in pixels."""
    padding: NonNegativeInt = 4
    """Black pixels added to each side of the (resized) image before the crop."""
    resize: PositiveInt | None = None
    """Length of the image's short side after the resize, in pixels. None: no resize."""


@dataclass(frozen=True)
class CenterCrop(Checked):
    """Center square, after an optional resize of the short side: the usual evaluation crop."""

    size: PositiveInt = 224
    """Side of the output, in pixels."""
    resize: PositiveInt | None = 256
    """Length of the image's short side after the resize, in pixels. None: no resize."""


@dataclass(frozen=True)
class Resize(Checked):
    """The whole image, resized to a square without keeping its aspect ratio (VOC07 SVM)."""

    size: PositiveInt = 224
    """Side of the output, in pixels."""


Crop = RandomResizedCrop | RandomCrop | CenterCrop | Resize


@dataclass(frozen=True)
class ColorJitter(Checked):
    """Random color changes, drawn again for every sample and epoch.

    Implemented in `pipelines.device.color_jitter`.
    """

    brightness: NonNegativeFloat = 0.0
    """b: brightness is scaled by a random factor in [max(0, 1 - b), 1 + b]."""
    contrast: NonNegativeFloat = 0.0
    """Like brightness, for the contrast."""
    saturation: NonNegativeFloat = 0.0
    """Like brightness, for the saturation."""
    hue: Annotated[float, at_least(0), at_most(0.5)] = 0.0
    """h: hue is rotated by a random fraction of the circle in [-h, h]. At most 0.5."""
    lighting: NonNegativeFloat = 0.0
    """Standard deviation of the noise along the principal colors (PCA lighting). AlexNet: 0.1."""

    @property
    def active(self) -> bool:
        """Whether any of the values is not zero."""
        return self != NO_COLOR_JITTER


NO_COLOR_JITTER = ColorJitter()
"""Leaves colors unchanged."""


@dataclass(frozen=True)
class Normalize(Checked):
    """Mean and standard deviation of each channel."""

    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean of the R, G and B channels, in units of 0 to 255."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (58.395, 57.12, 57.375)
    """Standard deviation of the R, G and B channels, in units of 0 to 255."""


IMAGENET = Normalize()
"""ImageNet statistics, as in every model zoo: 0.485/0.456/0.406 and 0.229/0.224/0.225."""

CIFAR10 = Normalize((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
"""CIFAR-10 statistics of the RotNet authors (gidariss/FeatureLearningRotNet, dataloader.py)."""


@dataclass(frozen=True)
class Shard(Checked):
    """The part of every global batch that this process loads."""

    rank: NonNegativeInt = 0
    """Rank of this process, in [0, world)."""
    world: PositiveInt = 1
    """Number of processes."""
    local_world: PositiveInt = 1
    """Number of processes on this machine. They share its CPU cores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank >= self.world:
            raise ValueError(f"rank {self.rank} is not in a world of {self.world}")


@dataclass(frozen=True)
class LoaderSpec(Checked):
    """All options of a loader. Equal specs emit equal samples and crops.

    Paths may be given as `os.PathLike`; the fields are strings.
    """

    data: NonEmptyStr = "synthetic"
    """A .beton file, a folder of images, a list file, or "synthetic" (random images). With `root`
    also imagenet-val:TRUTH, imagenet-subset:LIST, inaturalist:JSON and voc2007:SPLIT; see
    `pipelines.datasets.images.open_images`."""
    root: NonEmptyStr | None = None
    """Folder of the images, for a list file or KIND:NAME. None: the folder of the list file."""
    engine: Engine = "auto"
    """auto chooses the fastest installed engine for the data (ffcv, dali, folder) and logs why."""
    batch_size: PositiveInt = 64
    """Images per process and step. With views=rotate4 the network sees four times as many."""
    crop: Crop = field(default_factory=RandomResizedCrop)
    """Crop and output size. All engines use the same crop boxes."""
    flip: bool = True
    """Flip horizontally with probability 0.5, before any rotation."""
    color_jitter: ColorJitter = NO_COLOR_JITTER
    """Random color changes, on the device, after crop and flip. Needs views=plain."""
    normalize: Normalize = IMAGENET
    """Mean and standard deviation of each channel. Applied on the device."""
    views: Literal["rotate4", "plain"] = "rotate4"
    """rotate4 emits each crop at 0, 90, 180 and 270 degrees. plain emits it once, unrotated."""
    shuffle: bool = True
    """Shuffle the samples in each epoch. False keeps the order of the data set."""
    drop_last: bool = True
    """Drop the last, incomplete global batch. False pads it with samples marked as not valid."""
    max_samples: PositiveInt | None = None
    """Use a random subset of this many samples. The same for equal seeds, with any engine."""
    samples_per_class: PositiveInt | None = None
    """Use a random subset of this many samples per class. Excludes `max_samples`."""
    seed: Seed = 0
    """Seed of all random choices. Order, crops and flips depend on seed, epoch and sample index."""
    workers: NonNegativeInt = 0
    """Decoding threads per process. 0: divide the available cores among the local processes."""
    max_undecodable: NonNegativeInt = 0
    """Undecodable samples tolerated per epoch. Masked and counted. One more is an error."""
    resolution_schedule: tuple[tuple[NonNegativeInt, PositiveInt], ...] = ()
    """Progressive resizing: pairs of first epoch and output side in pixels. ((0, 128), (30, 192))
    means 128 up to epoch 29, then 192. No side may exceed crop.size. Empty: always crop.size."""
    resize: Literal["cpu", "device"] = "cpu"
    """Where crops are resized. device (engine=ffcv only) sends crops to the device at their
    original size: more bytes over the bus, less work for the CPU."""
    decoder: Literal["auto", "cpu", "mixed"] = "auto"
    """Where DALI decodes. mixed: with nvJPEG on the GPU. auto: mixed if batches go to a GPU."""
    hw_decoder_load: Annotated[float, at_least(0), at_most(1)] | None = None
    """Fraction of the images that DALI's mixed decoder gives to the GPU's hardware JPEG engine,
    0 to 1. None: 0.65. An error if nothing is decoded on a GPU."""
    cpu_budget: Fraction | None = None
    """Fraction of the available cores that decoding may use. Needs workers=0. None: 1, or 0.4 if
    batches go to a GPU (busier cores slow down kernel launches)."""
    timeout: PositiveFloat = 120.0
    """Seconds to wait for a batch before an error (twice as long for the first batch)."""
    samples: PositiveInt = 1024
    """Number of samples of the synthetic data set. Not used for other data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_samples is not None and self.samples_per_class is not None:
            raise ValueError("samples_per_class excludes max_samples")
        if self.color_jitter.active and self.views != "plain":
            raise ValueError("color_jitter needs views=plain")
        _check_resolutions(self.resolution_schedule, self.crop)

    @property
    def view_count(self) -> int:
        """Views emitted per image."""
        return 4 if self.views == "rotate4" else 1

    def fingerprint_fields(self) -> dict[str, object]:
        """Return the fields that decide which pixels come in which order, as plain data.

        The data set itself is not included. Neither are the engine and the device that resizes:
        they change pixels by rounding only.
        """
        fields = asdict(self)
        names = [*_FINGERPRINT_FIELDS, *(["color_jitter"] if self.color_jitter.active else [])]
        return {name: fields[name] for name in names}

    def scalars(self, epoch: int) -> dict[str, float]:
        """Return values to log for an epoch, besides the losses."""
        return {"side": float(self.side(epoch))} if self.resolution_schedule else {}

    def side(self, epoch: int) -> int:
        """Return the side of the crops that an epoch emits, in pixels."""
        return next(
            (side for first, side in reversed(self.resolution_schedule) if first <= epoch),
            self.crop.size,
        )


def check_options(spec: LoaderSpec, engine: Engine, *, on_gpu: bool) -> None:
    """Refuse options that the engine would ignore.

    Args:
        spec: The options. Those of decoding are not checked for synthetic images.
        engine: The engine in use; never `auto`.
        on_gpu: Whether batches go to a GPU.

    Raises:
        ValueError: An option has no effect with this engine.
    """
    if spec.resize == "device" and engine != "ffcv":
        raise ValueError(f"resize=device is for engine=ffcv; {engine} emits resized crops only")
    if engine == "synthetic":
        return
    if engine != "dali" and spec.decoder != "auto":
        raise ValueError(f"decoder={spec.decoder} is for engine=dali; {engine} decodes on the CPU")
    if spec.hw_decoder_load is not None and (
        engine != "dali" or spec.decoder == "cpu" or not on_gpu
    ):
        raise ValueError(
            f"hw_decoder_load={spec.hw_decoder_load:g} is for engine=dali with batches on "
            f"a GPU and decoder=auto or mixed; here {engine} decodes on the CPU"
        )
    if spec.cpu_budget is not None and spec.workers:
        raise ValueError(
            f"cpu_budget={spec.cpu_budget:g} is for workers=0; workers={spec.workers} is already "
            "a number of threads"
        )


def _check_resolutions(schedule: tuple[tuple[int, int], ...], crop: Crop) -> None:
    if not schedule:
        return
    if not isinstance(crop, RandomResizedCrop):
        # The size of other crop boxes depends on the output side: another side, another region.
        raise ValueError("resolution_schedule needs a RandomResizedCrop")
    firsts = [first for first, _ in schedule]
    if firsts[0] != 0 or sorted(set(firsts)) != firsts:
        raise ValueError(f"resolution_schedule needs rising epochs from 0 on, got {firsts}")
    if any(side > crop.size for _, side in schedule):
        raise ValueError(
            f"sides of resolution_schedule must be at most crop.size ({crop.size}), got {schedule}"
        )
