"""Contestants: beton writers. Ours passes JPEG files through; FFCV's re-encodes them."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from pathlib import Path

from PIL import Image

from harness.timing import cpu_seconds, memory_mib
from pipelines.beton.reader import Beton
from pipelines.conversion.convert import write_beton
from pipelines.conversion.encode import Check
from pipelines.datasets.index import SampleIndex


class _Writer:
    """Converts a folder repeatedly; a window is a number of whole conversions."""

    def __init__(self, *, data: str, workers: int) -> None:
        self.workers = workers
        self.index = SampleIndex.from_folder(data)
        # Beside the images, so that all writers use the same disk.
        self._folder = tempfile.TemporaryDirectory(dir=Path(data).parent)
        self.target = Path(self._folder.name) / "out.beton"
        self.source_bytes = sum(self.index.size(i) for i in range(len(self.index)))

    def write(self) -> None:
        """Convert the folder into `target`."""
        raise NotImplementedError

    def first_batch(self) -> dict[str, float]:
        """Convert once, untimed, to fill caches and compile."""
        self.write()
        return {}

    def window(self, seconds: float) -> tuple[int, float, float]:
        """Convert for about `seconds`, at least once; returns the fields of a `Window`.

        CPU seconds include all worker processes.
        """
        images, cpu, begin = 0, cpu_seconds(), time.perf_counter()
        while not images or time.perf_counter() - begin < seconds:
            self.write()
            images += len(self.index)
        return images, time.perf_counter() - begin, cpu_seconds() - cpu

    def output_bytes(self) -> dict[str, float]:
        """Return the bytes of the source images and of the output, side files included."""
        files = [path for path in self.target.parent.iterdir() if path.is_file()]
        total = sum(path.stat().st_size for path in files)
        return {
            "source_bytes": self.source_bytes,
            "payload_bytes": self.payload(),
            "side_bytes": total - self.target.stat().st_size,
            "file_bytes": total,
        }

    def payload(self) -> int:
        """Return the bytes of all samples in the file."""
        with Beton.open(self.target) as beton:
            return int(beton.sizes.sum())

    def memory(self) -> dict[str, float]:
        """Return MiB of this process and its workers."""
        return memory_mib()

    def close(self) -> None:
        """Remove the output."""
        self._folder.cleanup()


class OurWriter(_Writer):
    """`write_beton`: copies JPEG streams unchanged and checks that each is sound."""

    def __init__(
        self,
        *,
        data: str,
        workers: int,
        markers: bool,
        max_side: int | None,
        check: Check = "scan",
    ) -> None:
        super().__init__(data=data, workers=workers)
        self.options = {"restart_markers": markers, "max_side": max_side, "check": check}

    def write(self) -> None:
        write_beton(self.index, self.target, workers=self.workers, overwrite=True, **self.options)


class StockFiles:
    """A folder as an indexed data set of (image, label), the input of FFCV's writer."""

    def __init__(self, folder: str) -> None:
        self.index = SampleIndex.from_folder(folder)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        with Image.open(self.index.path(i)) as image:
            return image.convert("RGB"), int(self.index.labels[i])


class StockWriter(_Writer):
    """FFCV's DatasetWriter: Pillow decodes every image, OpenCV encodes it at quality 90."""

    def __init__(self, *, data: str, workers: int, max_side: int | None) -> None:
        super().__init__(data=data, workers=workers)
        self.files, self.max_side = StockFiles(data), max_side
        import ffcv.writer  # noqa: F401  (its time is not the writer's)

    def write(self) -> None:
        write_stock(self.files, self.target, workers=self.workers, max_side=self.max_side)


def write_stock(images: StockFiles, target: Path, *, workers: int, max_side: int | None) -> None:
    """Write a beton with FFCV's own writer.

    Args:
        images: The folder.
        target: The beton to write.
        workers: Worker processes.
        max_side: Longest side in pixels; None keeps the images' own sizes. JPEG quality is 90.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    image = RGBImageField(write_mode="jpg", max_resolution=max_side, jpeg_quality=90)
    made = DatasetWriter(str(target), {"image": image, "label": IntField()}, num_workers=workers)
    made.from_indexed_dataset(images, chunksize=16)
    # The writer does not join its workers, and their CPU time counts only after they are joined.
    for process in multiprocessing.active_children():
        process.join(timeout=60)
