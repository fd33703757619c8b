"""TensorBoard's file of a run: the scalars of log.jsonl again, and the figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LOADER = ("images_per_s", "views_per_s", "data_wait_percent", "rss_mib", "cuda_peak_mib")
"""Fields of a row of log.jsonl that are shown under `loader/`."""


class Scalars:
    """Writes one folder of events; made at first use, because the import takes a second.

    Call it only after a file of our own was written: TensorBoard writes in a thread, and a disk
    that is full there ends the thread with a traceback on the console. For the same reason
    everything is flushed here, in this thread, rather than some time later in that one. The first
    `OSError` is raised; after it nothing more is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._lost = False

    def interval(
        self, row: Mapping[str, object], values: Mapping[str, float], *, step: int, resumed: int
    ) -> None:
        """Add `values` as train/NAME, and what `row` says of the loader as loader/NAME."""
        scalars: dict[str, float] = {f"train/{name}": value for name, value in values.items()}
        for name in LOADER:
            if isinstance(number := row.get(name), int | float):
                scalars[f"loader/{name}"] = number
        self.add(scalars, step=step, resumed=resumed)

    def add(self, scalars: Mapping[str, float], *, step: int, resumed: int) -> None:
        """Add scalars under their full names."""

        def write(writer: SummaryWriter) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

        self._write(write, resumed=resumed)

    def image(self, name: str, pixels_HWC: NDArray[np.uint8], *, step: int, resumed: int) -> None:
        """Add an image (H, W, 3)."""
        self._write(
            lambda writer: writer.add_image(name, pixels_HWC, step, dataformats="HWC"),
            resumed=resumed,
        )

    def close(self) -> None:
        """Close the file. Harmless where nothing was written, or twice."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _write(self, write: Callable[[SummaryWriter], Any], *, resumed: int) -> None:
        if self._lost:
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard.writer import SummaryWriter

                # Where a run resumes, TensorBoard hides what the lost work had written.
                self._writer = SummaryWriter(
                    str(self._folder),
                    purge_step=resumed + 1 if resumed else None,
                    flush_secs=10**6,
                )
            write(self._writer)
            self._writer.flush()
        except OSError:
            self._writer, self._lost = None, True
            raise


def pixels(fig: Figure) -> npt.NDArray[np.uint8]:
    """Draw a figure: uint8 (height, width, 3), RGB."""
    canvas = FigureCanvasAgg(fig)
    canvas.draw()  # type: ignore[no-untyped-call]
    rgba = np.asarray(canvas.buffer_rgba(), dtype=np.uint8)  # type: ignore[no-untyped-call]
    return np.ascontiguousarray(rgba[..., :3])
