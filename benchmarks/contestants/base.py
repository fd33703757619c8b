"""Base class of the loader contestants: first batch, timed windows, pixel difference, memory.

The methods are called through a pipe, so they return what JSON can hold.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms.v2 import functional as tv

from harness.timing import WARMUP_BATCHES, memory_mib, synchronize, window
from pipelines.imaging.decode import decode_rgb
from pipelines.jpeg.markers import read_header
from pipelines.samples import Samples
from pipelines.sampling.crops import crop_boxes
from pipelines.spec import LoaderSpec, RandomResizedCrop

Pixels = npt.NDArray[np.uint8]


class DeliveredCrop(NamedTuple):
    """A crop that a contestant delivered, with its source image and crop box."""

    data: bytes
    """The encoded image."""
    box: tuple[int, ...]
    """top, left, height, width, flip (0 or 1)."""
    pixels: Pixels
    """uint8 (S, S, 3)."""


class LoaderContestant:
    """A loader. Subclasses implement `open`, `batches` and `delivered_crops`."""

    def __init__(self, *, data: str, size: int, batch_size: int, workers: int) -> None:
        """Import what the loader needs; open no data.

        Args:
            data: File or folder.
            size: Side of the crops S in pixels.
            batch_size: Source images per batch.
            workers: Decoding threads or processes.
        """
        self.data, self.size, self.batch_size, self.workers = data, size, batch_size, workers
        self.device = torch.device("cpu")
        self.spec = LoaderSpec(data=data, batch_size=batch_size, crop=RandomResizedCrop(size))
        self.warmup = WARMUP_BATCHES
        self._epoch = 0

    def open(self) -> None:
        """Open the data and build the loader."""
        raise NotImplementedError

    def batches(self, epoch: int) -> Generator[int, None, None]:
        """Load one epoch; yield each batch's number of images. Closing the generator stops it."""
        raise NotImplementedError

    def delivered_crops(self) -> Iterator[DeliveredCrop]:
        """Yield crops with known boxes, made in the same way as by `batches`."""
        raise NotImplementedError

    def close(self) -> None:
        """Release threads and processes."""

    def endless(self) -> Generator[int, None, None]:
        """Load epoch after epoch, from one that has not begun yet, as `batches` does."""
        while True:
            self._epoch += 1
            yield from self.batches(self._epoch)

    def first_batch(self) -> dict[str, float]:
        """Return the seconds from opening the data to the first batch, without imports."""
        begin = time.perf_counter()
        self.open()
        with closing(self.batches(0)) as batches:
            next(batches)
            synchronize(self.device)
            return {"first_batch_seconds": round(time.perf_counter() - begin, 3)}

    def window(self, seconds: float) -> tuple[int, float, float]:
        """Measure one `Window`, which starts a few batches after the loader; returns its fields."""
        with closing(self.endless()) as batches:
            for _ in range(self.warmup):
                next(batches)
            return tuple(window(batches, seconds=seconds, device=self.device))

    def difference(self, count: int = 48) -> dict[str, float]:
        """Compare up to `count` crops with `reference_crop` of the same boxes.

        Returns:
            Mean absolute difference and mean difference in units of 0 to 255, number of crops.
        """
        errors = [
            crop.pixels.astype(np.int16) - reference_crop(crop.data, crop.box, self.size)
            for crop in islice(self.delivered_crops(), count)
        ]
        error = np.stack(errors)
        return {
            "pixel_difference": round(float(np.abs(error).mean()), 3),
            "pixel_bias": round(float(error.mean()), 3),
            "pixel_crops": len(errors),
        }

    def memory(self) -> dict[str, float]:
        """Return MiB of this process and its workers."""
        return memory_mib()


def reference_crop(data: bytes, box: tuple[int, ...], size: int) -> npt.NDArray[np.int16]:
    """Return the expected crop (S, S, 3): Pillow's decoder, antialiased bilinear resize.

    Pillow uses libjpeg's accurate inverse transform.

    Args:
        data: The encoded image.
        box: top, left, height, width, flip.
        size: Side of the crop S in pixels.
    """
    top, left, height, width, flip = box
    image = torch.from_numpy(decode_rgb(data)).permute(2, 0, 1)
    region = image[:, top : top + height, left : left + width].float()
    crop = tv.resize(region, [size, size], antialias=True).round().clamp(0, 255)
    if flip:
        crop = crop.flip(2)
    return crop.permute(1, 2, 0).to(torch.int16).numpy()


def boxes_of(spec: LoaderSpec, samples: Samples, *, epoch: int) -> npt.NDArray[np.int32]:
    """Return the crop boxes of a whole data set, int32 (N, 5); sizes come from the JPEG headers."""
    sizes = [read_header(bytes(samples.read(i))).upright for i in range(len(samples))]
    heights, widths = np.array(sizes, np.int32).T
    indices = np.arange(len(samples), dtype=np.int64)
    return crop_boxes(spec, epoch=epoch, indices=indices, heights=heights, widths=widths)


def unnormalized(images: torch.Tensor, spec: LoaderSpec) -> Pixels:
    """Undo the normalisation: (B, 3, S, S) to uint8 (B, S, S, 3)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.normalize.mean, spec.normalize.std))
    pixels = (images.float().cpu() * std + mean).round().clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).to(torch.uint8).numpy()
