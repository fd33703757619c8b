"""What to load and how: frozen dataclasses, no behaviour beyond checking themselves."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

Engine = Literal["auto", "ffcv", "dali", "folder", "synthetic"]
Precision = Literal["fp32", "bf16", "fp16"]

_FINGERPRINT_FIELDS = (
    "crop", "resolution_schedule", "flip", "normalize", "shuffle", "max_samples", "samples_per_class", "seed", "max_undecodable",
    "samples",
)  # fmt: skip


@dataclass(frozen=True)
class RandomResizedCrop:
    """A box of random area and aspect ratio, resized to a square (Inception's crop)."""

    size: int = 224
    """Side of the output in pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the box's share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the box's width / height, drawn uniformly in its logarithm."""


@dataclass(frozen=True)
class RandomCrop:
    """A square at a random place, after an optional resize of the short side; black padding."""

    size: int = 32
    """Side of the output in pixels."""
    padding: int = 4
    """Black pixels added on each side of the (resized) image before the crop."""
    resize: int | None = None
    """Length in pixels that the short side is resized to first; None keeps the image's own."""


@dataclass(frozen=True)
class CenterCrop:
    """The middle square, after a resize of the short side: the usual evaluation crop."""

    size: int = 224
    """Side of the output in pixels."""
    resize: int | None = 256
    """Length in pixels that the short side is resized to first; None keeps the image's own."""


@dataclass(frozen=True)
class Resize:
    """The whole image resized to a square, its aspect ratio ignored (VOC07 SVM features)."""

    size: int = 224
    """Side of the output in pixels."""


Crop = RandomResizedCrop | RandomCrop | CenterCrop | Resize


@dataclass(frozen=True)
class ColorJitter:
    """Random changes of color, different for every sample and epoch (`pipelines.device.color_jitter`)."""

    brightness: float = 0.0
    """A factor is drawn from 1 - b to 1 + b, not below 0."""
    contrast: float = 0.0
    """As brightness."""
    saturation: float = 0.0
    """As brightness."""
    hue: float = 0.0
    """Turns the hue by a share of the circle from -h to h; at most 0.5."""
    lighting: float = 0.0
    """Standard deviation of the noise along the principal colors (PCA lighting; AlexNet: 0.1)."""

    def __post_init__(self) -> None:
        values = (self.brightness, self.contrast, self.saturation, self.hue, self.lighting)
        if min(values) < 0 or self.hue > 0.5:
            raise ValueError(
                f"color_jitter must not be negative, and hue at most 0.5, got {values}"
            )

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return self != NO_COLOR_JITTER


NO_COLOR_JITTER = ColorJitter()
"""Colors as they are."""


@dataclass(frozen=True)
class Normalize:
    """Mean and standard deviation of each RGB channel, in units of 0 to 255."""

    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)


IMAGENET = Normalize()
"""The ImageNet statistics that every model zoo uses: 0.485/0.456/0.406 and 0.229/0.224/0.225."""

CIFAR10 = Normalize((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
"""The RotNet authors' CIFAR-10 statistics (gidariss/FeatureLearningRotNet, dataloader.py)."""


@dataclass(frozen=True)
class Shard:
    """Which part of every global batch this process takes: rank of world."""

    rank: int = 0
    world: int = 1
    local_world: int = 1
    """Processes on this machine: they share its cores."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} is not in a world of {self.world}")


@dataclass(frozen=True)
class LoaderSpec:
    """Everything that decides what a loader emits. Equal specs emit equal samples and crops."""

    data: str = "synthetic"
    """A .beton file, a folder of images, or a list file; with `root` also imagenet-val:TRUTH,
    imagenet-subset:LIST, inaturalist:JSON and voc2007:SPLIT (`pipelines.datasets.images.open_images`);
    "synthetic" makes random images."""
    root: str = ""
    """Folder that a list's paths are relative to (empty: the list's own), or that the images of
    KIND:NAME lie in."""
    engine: Engine = "auto"
    """auto takes the fastest engine present for this data (ffcv, dali, folder) and logs why."""
    batch_size: int = 64
    """Source images per process and step; the network sees four times as many with rotate4."""
    crop: Crop = field(default_factory=RandomResizedCrop)
    """The crop; every engine cuts the same boxes."""
    flip: bool = True
    """Mirror left to right with probability one half, before any rotation."""
    color_jitter: ColorJitter = NO_COLOR_JITTER
    """Random changes of color after crop and flip, on the device; of plain views only."""
    normalize: Normalize = IMAGENET
    """Channel statistics applied on the device."""
    views: Literal["rotate4", "plain"] = "rotate4"
    """rotate4 emits each crop at 0, 90, 180 and 270 degrees; plain emits it once."""
    shuffle: bool = True
    """A new permutation each epoch; False keeps the order of the index."""
    drop_last: bool = True
    """Drop the last incomplete global batch; False pads it with samples marked not valid."""
    max_samples: int | None = None
    """Use only this many samples, drawn once with the seed, equal for all engines."""
    samples_per_class: int | None = None
    """Use only this many samples of every class, drawn like `max_samples`."""
    seed: int = 0
    """Decides permutations, crops and flips, together with epoch and sample index."""
    workers: int = 0
    """Decoding threads per process; 0 shares the allowed cores among the local processes."""
    max_undecodable: int = 0
    """Undecodable samples per epoch that are masked and counted; one more stops the run."""
    resolution_schedule: tuple[tuple[int, int], ...] = ()
    """Progressive resolution, pairs of first epoch and side in pixels: ((0, 128), (30, 192)) emits
    crops of 128 up to epoch 29, then of 192. Empty: always crop.size, which is also the largest."""
    resize: Literal["cpu", "device"] = "cpu"
    """Where crops are resized: cpu, or device, to which the cut regions are then sent as they are
    (engine=ffcv only; more bytes over the bus, less work for the cores)."""
    decoder: Literal["auto", "cpu", "mixed"] = "auto"
    """Where DALI decodes: mixed is nvJPEG on the GPU; auto takes it where batches go to a GPU."""
    hw_decoder_load: float | None = None
    """Share of the images that DALI's mixed decoder gives to the GPU's JPEG engine, 0 to 1; None:
    0.65. Refused where nothing is decoded on a GPU."""
    cpu_budget: float | None = None
    """Share of the allowed cores that decoding may use where `workers` is 0, and refused where it
    is not; None: 0.4 where batches go to a GPU (busier cores slow the launching of kernels), else
    1."""
    timeout: float = 120.0
    """Seconds to wait for a batch (twice that for the first one) before giving up."""
    samples: int = 1024
    """Length of the synthetic data set; nothing else reads it."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {self.max_samples}")
        if self.samples_per_class is not None and (
            self.samples_per_class < 1 or self.max_samples is not None
        ):
            raise ValueError(
                "samples_per_class must be at least 1, and does not go with max_samples"
            )
        if self.crop.size < 1:
            raise ValueError(f"crop.size must be at least 1, got {self.crop.size}")
        if self.color_jitter.active and self.views != "plain":
            raise ValueError("color_jitter is for plain views")
        _check_resolutions(self.resolution_schedule, self.crop)
        if self.hw_decoder_load is not None and not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load must be in 0..1, got {self.hw_decoder_load}")
        if self.cpu_budget is not None and not 0 < self.cpu_budget <= 1:
            raise ValueError(f"cpu_budget must be above 0 and at most 1, got {self.cpu_budget}")
        if self.workers < 0 or self.max_undecodable < 0 or self.timeout <= 0:
            raise ValueError(
                "workers and max_undecodable must not be negative, timeout must be positive"
            )

    @property
    def view_count(self) -> int:
        """Views emitted per source image."""
        return 4 if self.views == "rotate4" else 1

    def fingerprint_fields(self) -> dict[str, object]:
        """Plain data: all that decides which pixels come in which order, but for the data.

        The engine is not among it, nor is where crops are resized: both change pixels by rounding
        only.
        """
        fields = asdict(self)
        names = [*_FINGERPRINT_FIELDS, *(["color_jitter"] if self.color_jitter.active else [])]
        return {name: fields[name] for name in names}

    def scalars(self, epoch: int) -> dict[str, float]:
        """What the log shows beside the losses of an epoch."""
        return {"side": float(self.side(epoch))} if self.resolution_schedule else {}

    def side(self, epoch: int) -> int:
        """Side in pixels of the crops that an epoch emits."""
        return next(
            (side for first, side in reversed(self.resolution_schedule) if first <= epoch),
            self.crop.size,
        )


def check_options(spec: LoaderSpec, engine: Engine, *, on_gpu: bool) -> None:
    """Raise `ValueError` for an option that an engine would not read.

    Args:
        spec: with what the user has chosen; synthetic images are not decoded, so that nothing about
            decoding is refused for them.
        engine: that `auto` stands for.
        on_gpu: whether batches go to a GPU.
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
            f"hw_decoder_load={spec.hw_decoder_load:g} is for engine=dali with batches that go to "
            f"a GPU and decoder=auto or mixed; here {engine} decodes on the CPU"
        )
    if spec.cpu_budget is not None and spec.workers:
        raise ValueError(
            f"cpu_budget={spec.cpu_budget:g} is for workers=0; workers={spec.workers} is a number "
            "of threads already"
        )


def _check_resolutions(schedule: tuple[tuple[int, int], ...], crop: Crop) -> None:
    if not schedule:
        return
    if not isinstance(crop, RandomResizedCrop):
        # Other crops are cut at the output's own scale: another side would show another region.
        raise ValueError("resolution_schedule needs a RandomResizedCrop")
    firsts = [first for first, _ in schedule]
    if firsts[0] != 0 or sorted(set(firsts)) != firsts:
        raise ValueError(f"resolution_schedule must begin at epoch 0 and rise, got epochs {firsts}")
    if any(not 1 <= side <= crop.size for _, side in schedule):
        raise ValueError(
            f"sides of resolution_schedule must be in 1..crop.size ({crop.size}), got {schedule}"
        )
