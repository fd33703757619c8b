"""What every contestant of a loader benchmark does alike: first batch, windows, pixels, memory.

Its methods are called from the other side of a pipe: they return what JSON can hold.
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
from harness.timing import WARMUP_BATCHES, finish, memory_mib, window
from torchvision.transforms.v2 import functional as tv

from pipelines.engines.samples import Samples, encoded
from pipelines.imaging.decode import decode_rgb
from pipelines.jpeg.markers import read_header
from pipelines.sampling.crops import crop_boxes
from pipelines.spec import LoaderSpec, RandomResizedCrop

Pixels = npt.NDArray[np.uint8]


class Cut(NamedTuple):
    """A crop that a contestant delivered, and what it was cut from."""

    data: bytes
    """The encoded image."""
    box: tuple[int, ...]
    """top, left, height, width, and 1 where it is mirrored."""
    pixels: Pixels
    """(S, S, 3)."""


class Player:
    """A loader: `batches` and `cuts` are its own, the rest is alike for all."""

    def __init__(self, *, data: str, size: int, batch_size: int, workers: int) -> None:
        """Import what is needed, open nothing.

        Args:
            data: file or folder.
            size: side of the crops in pixels.
            batch_size: source images in a batch.
            workers: threads or processes that decode.
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
        """Deliver one epoch's batches, by their number of images; closing it ends the work."""
        raise NotImplementedError

    def cuts(self) -> Iterator[Cut]:
        """Crops of known boxes, made as `batches` makes them."""
        raise NotImplementedError

    def close(self) -> None:
        """Release threads and processes."""

    def endless(self) -> Generator[int, None, None]:
        """Batches of one epoch after the other, from one that was not begun yet."""
        while True:
            self._epoch += 1
            yield from self.batches(self._epoch)

    def first_batch(self) -> dict[str, float]:
        """Seconds from opening the data to the first batch; imports are not counted."""
        begin = time.perf_counter()
        self.open()
        with closing(self.batches(0)) as batches:
            next(batches)
            finish(self.device)
            return {"first_batch_seconds": round(time.perf_counter() - begin, 3)}

    def window(self, seconds: float) -> tuple[int, float, float]:
        """One `Window`, begun a few batches after the loader has started to work."""
        with closing(self.endless()) as batches:
            for _ in range(self.warmup):
                next(batches)
            return tuple(window(batches, seconds=seconds, device=self.device))

    def difference(self, count: int = 48) -> dict[str, float]:
        """How far the crops are from Pillow's decoder and torchvision's antialiased resize of the
        same boxes: mean absolute difference and mean difference, in units of 0 to 255."""
        off, crops = [], 0
        for cut in islice(self.cuts(), count):
            wanted = reference(cut.data, cut.box, self.size)
            off.append(cut.pixels.astype(np.int16) - wanted)
            crops += 1
        error = np.stack(off)
        return {
            "pixel_difference": round(float(np.abs(error).mean()), 3),
            "pixel_bias": round(float(error.mean()), 3),
            "pixel_crops": crops,
        }

    def memory(self) -> dict[str, float]:
        """MiB of this process and its workers."""
        return memory_mib()


def reference(data: bytes, box: tuple[int, ...], size: int) -> npt.NDArray[np.int16]:
    """The crop as it should be: libjpeg's accurate decoder, antialiased bilinear resize."""
    top, left, height, width, flip = box
    image = torch.from_numpy(decode_rgb(data)).permute(2, 0, 1)
    region = image[:, top : top + height, left : left + width].float()
    crop = tv.resize(region, [size, size], antialias=True).round().clamp(0, 255)
    if flip:
        crop = crop.flip(2)
    return crop.permute(1, 2, 0).to(torch.int16).numpy()


def boxes_of(spec: LoaderSpec, samples: Samples, *, epoch: int) -> npt.NDArray[np.int32]:
    """int32 (N, 5): the boxes of a whole data set, sizes read from the JPEG headers."""
    sizes = [read_header(bytes(encoded(samples, i))).upright for i in range(len(samples))]
    heights, widths = np.array(sizes, np.int32).T
    indices = np.arange(len(samples), dtype=np.int64)
    return crop_boxes(spec, epoch=epoch, indices=indices, heights=heights, widths=widths)


def unnormalized(images: torch.Tensor, spec: LoaderSpec) -> Pixels:
    """Normalised (B, 3, S, S) back to uint8 (B, S, S, 3)."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.normalize.mean, spec.normalize.std))
    pixels = (images.float().cpu() * std + mean).round().clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).to(torch.uint8).numpy()
