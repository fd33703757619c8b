"""Contestants: other loaders on the same images (torchvision, stock FFCV and DALI, mmselfsup).

Loaders that accept crop boxes get ours, precomputed, so that drawing them costs nothing. Stock FFCV
and DALI draw their own from the same distribution. Their pixels are compared on the central square,
with the same decoder and filter.
"""

from __future__ import annotations

import queue
import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import functional as pil_f
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from contestants.base import DeliveredCrop, LoaderContestant, boxes_of, unnormalized
from pipelines.beton.reader import Beton
from pipelines.datasets.index import SampleIndex
from pipelines.samples import open_samples

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
LIMIT_SECONDS = 60.0


class _Crops(Dataset[torch.Tensor]):
    """Data set of paths and crop boxes; a subclass decodes, crops and resizes."""

    def __init__(self, paths: list[str], where: np.ndarray, size: int) -> None:
        self.paths, self.where, self.size = paths, where, size

    def __len__(self) -> int:
        return len(self.paths)

    def pil(self, i: int) -> Image.Image:
        """Return the crop as torchvision's ImageFolder and RandomResizedCrop do, with Pillow."""
        top, left, height, width, flip = self.where[i].tolist()
        with open(self.paths[i], "rb") as file:
            image = Image.open(file).convert("RGB")
        size = [self.size, self.size]
        crop = pil_f.resized_crop(image, top, left, height, width, size)
        return pil_f.hflip(crop) if flip else crop


class _PilCrops(_Crops):
    def __getitem__(self, i: int) -> torch.Tensor:
        return pil_f.pil_to_tensor(self.pil(i))


class _TensorCrops(_Crops):
    def __getitem__(self, i: int) -> torch.Tensor:
        top, left, height, width, flip = self.where[i].tolist()
        with warnings.catch_warnings():
            # Since torchvision 0.29 each call warns that the function will move.
            warnings.simplefilter("ignore", DeprecationWarning)
            image = decode_jpeg(read_file(self.paths[i]), mode=ImageReadMode.RGB)
        size = [self.size, self.size]
        crop = tv.resized_crop(image, top, left, height, width, size, antialias=True)
        return tv.horizontal_flip(crop) if flip else crop


class _FourViews(_Crops):
    """Four normalised float32 copies of each image, made in the worker process."""

    def __init__(self, paths: list[str], where: np.ndarray, size: int, normalize: Any) -> None:
        super().__init__(paths, where, size)
        mean, std = ([v / 255 for v in values] for values in (normalize.mean, normalize.std))
        self.finish = v2.Compose(
            [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        )

    def __getitem__(self, i: int) -> torch.Tensor:
        crop = self.finish(self.pil(i))
        return torch.stack([torch.rot90(crop, k, (1, 2)) for k in range(4)])


class PilLoader(LoaderContestant):
    """torch's DataLoader on a folder, with Pillow in worker processes."""

    crops: type[_Crops] = _PilCrops

    def open(self) -> None:
        # Each worker prefetches two batches.
        self.warmup = max(self.warmup, 2 * self.workers + 2)
        self.index = SampleIndex.from_folder(self.data)
        paths = [str(self.index.path(i)) for i in range(len(self.index))]
        where = boxes_of(self.spec, self.index, epoch=0)
        self.dataset = self.make(paths, where)
        self.loader = DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self.workers,
            # Otherwise every epoch would start new processes.
            persistent_workers=True,
        )

    def make(self, paths: list[str], where: np.ndarray) -> _Crops:
        """Return the data set of crops."""
        return self.crops(paths, where, self.size)

    def batches(self, epoch: int) -> Generator[int, None, None]:  # noqa: ARG002
        yield from (len(batch) for batch in self.loader)

    def delivered_crops(self) -> Iterator[DeliveredCrop]:
        for i in range(len(self.dataset)):
            pixels = self.dataset[i].permute(1, 2, 0).numpy()
            box = tuple(self.dataset.where[i].tolist())
            yield DeliveredCrop(self.index.read(i), box, pixels)

    def close(self) -> None:
        # Ends the persistent worker processes.
        del self.loader


class TensorLoader(PilLoader):
    """torch's DataLoader, with torchvision's decode_jpeg and uint8 tensors in worker processes."""

    crops = _TensorCrops


class MmselfsupLoader(PilLoader):
    """mmselfsup: workers decode, crop, normalise, make four float32 copies and collate."""

    def make(self, paths: list[str], where: np.ndarray) -> _Crops:
        return _FourViews(paths, where, self.size, self.spec.normalize)

    def delivered_crops(self) -> Iterator[DeliveredCrop]:
        for i in range(len(self.dataset)):
            pixels = unnormalized(self.dataset[i][:1], self.spec)[0]
            yield DeliveredCrop(self.index.read(i), tuple(self.dataset.where[i].tolist()), pixels)


class StockFfcv(LoaderContestant):
    """FFCV as in its documentation, reading memory-mapped pages from the page cache."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        import ffcv.fields.rgb_image
        import ffcv.transforms

        self.ffcv, self.decoders, self.transforms = ffcv, ffcv.fields.rgb_image, ffcv.transforms

    def open(self) -> None:
        side = (self.size, self.size)
        decoder = self.decoders.RandomResizedCropRGBImageDecoder(side, scale=SCALE, ratio=RATIO)
        self.loader = self._loader(decoder, self.transforms.RandomHorizontalFlip(), order="RANDOM")

    def _loader(self, *operations: Any, order: str) -> Any:
        last = [self.transforms.ToTensor(), self.transforms.ToTorchImage()]
        return self.ffcv.loader.Loader(
            self.data,
            batch_size=self.batch_size,
            num_workers=self.workers,
            os_cache=True,
            order=getattr(self.ffcv.loader.OrderOption, order),
            drop_last=order == "RANDOM",
            seed=0,
            pipelines={"image": [*operations, *last], "label": None},
        )

    def batches(self, epoch: int) -> Generator[int, None, None]:  # noqa: ARG002
        running = iter(self.loader)
        try:
            yield from (len(images) for (images,) in running)
        finally:
            _end(running)

    def delivered_crops(self) -> Iterator[DeliveredCrop]:
        side = (self.size, self.size)
        decoder = self.decoders.CenterCropRGBImageDecoder(side, ratio=1)
        running = iter(self._loader(decoder, order="SEQUENTIAL"))
        try:
            with Beton.open(self.data) as beton:
                i = 0
                for (images,) in running:
                    for pixels in images.permute(0, 2, 3, 1).numpy():
                        box = _central_square(int(beton.heights[i]), int(beton.widths[i]))
                        yield DeliveredCrop(beton.payload(i).tobytes(), box, pixels)
                        i += 1
        finally:
            _end(running)


def _end(running: Any) -> None:
    """End FFCV's thread of an abandoned epoch.

    FFCV cannot do this itself: at the end of an epoch the thread waits for ever for room in its
    queue.

    Raises:
        TimeoutError: The thread has not ended in time.
    """
    running.iter_ixes = iter(())
    deadline = time.monotonic() + LIMIT_SECONDS
    while running.is_alive():
        if time.monotonic() > deadline:
            raise TimeoutError(f"FFCV's thread has not ended within {LIMIT_SECONDS:.0f} s")
        with suppress(queue.Empty):
            running.output_queue.get(timeout=0.05)


class StockDali(LoaderContestant):
    """DALI's own reader, random-crop decoder and antialiased resize, on the CPU."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        self.fn, self.types, self.pipeline = fn, types, Pipeline

    def open(self) -> None:
        index = SampleIndex.from_folder(self.data)
        paths = [str(index.path(i)) for i in range(len(index))]
        self.steps = len(paths) // self.batch_size
        self.pipe = self.pipeline(
            batch_size=self.batch_size, num_threads=self.workers, device_id=None, seed=1
        )
        with self.pipe:
            files, _ = self.fn.readers.file(files=paths, random_shuffle=True, name="files")
            images = self.fn.decoders.image_random_crop(
                files,
                device="cpu",
                output_type=self.types.RGB,
                random_area=list(SCALE),
                random_aspect_ratio=list(RATIO),
            )
            images = self._resized(images)
            images = self.fn.flip(images, horizontal=self.fn.random.coin_flip(probability=0.5))
            self.pipe.set_outputs(images)
        self.pipe.build()

    def _resized(self, images: Any) -> Any:
        return self.fn.resize(
            images,
            size=[self.size, self.size],
            interp_type=self.types.INTERP_LINEAR,
            antialias=True,
        )

    def batches(self, epoch: int) -> Generator[int, None, None]:  # noqa: ARG002
        for _ in range(self.steps):
            (images,) = self.pipe.run()
            yield len(torch.utils.dlpack.from_dlpack(images.as_tensor()))

    def delivered_crops(self) -> Iterator[DeliveredCrop]:
        samples = open_samples(self.data)
        for i in range(len(samples)):
            data = bytes(samples.read(i))
            with Image.open(Path(self.data) / samples.name(i)) as image:
                box = _central_square(image.height, image.width)
            pipe = self.pipeline(batch_size=1, num_threads=1, device_id=None)
            with pipe:
                source = self.fn.external_source(
                    source=[[np.frombuffer(data, np.uint8)]], cycle=True
                )
                images = self.fn.decoders.image_slice(
                    source,
                    start=list(box[:2]),
                    shape=list(box[2:4]),
                    axes=[0, 1],
                    device="cpu",
                    output_type=self.types.RGB,
                )
                pipe.set_outputs(self._resized(images))
            pipe.build()
            (crop,) = pipe.run()
            yield DeliveredCrop(data, box, np.array(crop.at(0)))

    def close(self) -> None:
        del self.pipe


def _central_square(height: int, width: int) -> tuple[int, int, int, int, int]:
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side, 0
