"""Our engines' resize compared with OpenCV's INTER_AREA (stock FFCV) and torchvision's.

    python benchmarks/resize.py --data train.beton --output resize.jsonl

Resizes random crops of decoded images on one thread. The rows give the speed and the pixels'
difference to Pillow's antialiased bilinear filter.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from harness.plots import bars
from harness.results import Row, TimingOptions, image_row, publish, ratio_row, row, run_program
from harness.timing import Window, abba, window
from pipelines.imaging.decode import decode_rgb
from pipelines.imaging.resize import resize_region, scratch_size
from pipelines.samples import open_samples
from pipelines.sampling.crops import crop_boxes
from pipelines.spec import LoaderSpec, RandomResizedCrop

Pixels = npt.NDArray[np.uint8]
OURS = "ours"
LARGEST_DIFFERENCE = 1.0
COLUMNS = ("cpu_seconds_per_1k_images", "pixel_difference", "pixel_bias", "target", "met")


class ImageCrop(NamedTuple):
    """A decoded image and a crop box."""

    image: Pixels
    """uint8 (H, W, 3)."""
    top: int
    left: int
    height: int
    width: int

    @property
    def region(self) -> Pixels:
        """The pixels in the box, a view (height, width, 3)."""
        rows = slice(self.top, self.top + self.height)
        return self.image[rows, self.left : self.left + self.width]


@dataclass(frozen=True)
class Arguments(TimingOptions):
    """Resizing of random crops: ours, OpenCV's INTER_AREA, torchvision's antialiased resize."""

    data: str | None = None
    """A .beton file or a folder of images; by default smooth noise of 500 x 375 pixels."""
    images: int = 128
    """Images to decode, spread over the data."""
    size: int = 224
    """Side of the output in pixels."""


def main(args: Arguments) -> None:
    """Measure and publish. User errors raise `ValueError` or `OSError`."""
    torch.set_num_threads(1)
    crops = _crops(args)
    work = _contestants(crops, args.size)
    reference = [_pillow(crop, args.size) for crop in crops]
    made = {
        name: [resize(crop) for crop in crops] for name, resize in work.items()
    }  # warms up, too
    windows: dict[str, list[Window]] = {name: [] for name in work}
    device = torch.device("cpu")
    for name in abba(tuple(work), args.repeats):
        windows[name].append(
            window(_endless(work[name], crops), seconds=args.seconds, device=device)
        )
    rows: list[Row] = []
    for name in work:
        off = np.stack(made[name]).astype(np.int64) - np.stack(reference)
        rows.append(
            image_row(
                "resize",
                name,
                f"{args.size}px crops",
                windows[name],
                views=1,
                threads=1,
                device=device,
                pixel_difference=round(float(np.abs(off).mean()), 4),
                pixel_bias=round(float(off.mean()), 4),
            )
        )
    for name in work:
        if name != OURS:
            pair = windows[OURS], windows[name]
            rows.append(ratio_row("resize", f"ours / {name}", *pair, target=1.0, device=device))
    rows.append(_difference(rows[0], device))
    publish(rows, args.output, COLUMNS)
    bars(rows[: len(work)], args.plot, title="Resizing random crops, one thread", ours=(OURS,))


def _difference(ours: Row, device: torch.device) -> Row:
    """Return our mean difference to Pillow's pixels, with its upper limit as the target."""
    off = ours["pixel_difference"]
    name, variant = "mean difference to Pillow's pixels", ours["variant"]
    return row(
        "resize", name, variant, [off], unit="levels", device=device, digits=4, order="",
        target=LARGEST_DIFFERENCE, better="lower",
    )  # fmt: skip


def _crops(args: Arguments) -> list[ImageCrop]:
    if args.data is None:
        noise = np.random.default_rng(0).integers(0, 256, (args.images, 24, 32, 3), np.uint8)
        images = [np.asarray(Image.fromarray(n).resize((500, 375))) for n in noise]
    else:
        samples = open_samples(args.data)
        count = len(samples.labels)
        chosen = np.linspace(0, count - 1, min(args.images, count)).astype(int)
        images = [decode_rgb(bytes(samples.read(int(i)))) for i in chosen]
    where = crop_boxes(
        LoaderSpec(crop=RandomResizedCrop(args.size)),
        epoch=0,
        indices=np.arange(len(images)),
        heights=np.array([p.shape[0] for p in images], np.int32),
        widths=np.array([p.shape[1] for p in images], np.int32),
    )
    return [ImageCrop(p, *box) for p, box in zip(images, where[:, :4].tolist(), strict=True)]


def _contestants(crops: list[ImageCrop], size: int) -> dict[str, Callable[[ImageCrop], Pixels]]:
    sides = [max(c.height for c in crops), max(c.width for c in crops)]
    scratch = np.empty(scratch_size(*sides, size), np.uint32)
    cv2 = importlib.import_module("cv2")
    cv2.setNumThreads(1)

    def ours(crop: ImageCrop) -> Pixels:
        region, out = crop.region, np.empty((size, size, 3), np.uint8)
        resize_region(
            region.ctypes.data, region.strides[0], crop.height, crop.width,
            out.ctypes.data, size, False, scratch,
        )  # fmt: skip
        return out

    def torchvision(crop: ImageCrop) -> Pixels:
        image = torch.from_numpy(crop.region).permute(2, 0, 1)[None]
        resized: torch.Tensor = tv.resize(image, [size, size], antialias=True)
        return resized[0].permute(1, 2, 0).numpy()

    area = functools.partial(cv2.resize, dsize=(size, size), interpolation=cv2.INTER_AREA)
    return {
        OURS: ours,
        "OpenCV INTER_AREA": lambda crop: area(crop.region),
        "torchvision antialiased": torchvision,
    }


def _pillow(crop: ImageCrop, size: int) -> Pixels:
    image = Image.fromarray(crop.region)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def _endless(resize: Callable[[ImageCrop], Pixels], crops: list[ImageCrop]) -> Iterator[int]:
    for crop in itertools.cycle(crops):
        resize(crop)
        yield 1


if __name__ == "__main__":
    run_program(main, Arguments, "resize")
