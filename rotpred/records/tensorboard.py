"""TensorBoard event file of a run: the scalars of log.jsonl and the figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard.writer import SummaryWriter

LOADER = {
    "images_per_s": "images_per_s",
    "views_per_s": "views_per_s",
    "data_wait_percent": "wait_percent",
    "rss_mib": "rss_mib",
    "cuda_peak_mib": "cuda_peak_mib",
}
"""Columns of log.jsonl, and their tags under `loader/`: a renamed tag would split a curve."""


class TensorBoardWriter:
    """Writes one folder of events, created at first use because the import takes a second.

    Call it only after writing a file of our own: TensorBoard writes in a thread, and on a full disk
    that thread ends with a traceback on the console. For the same reason every call flushes here,
    in the calling thread. The first `OSError` is raised; nothing is written after it.
    """

    def __init__(self, folder: Path, *, resumed: int) -> None:
        """Write nothing yet. `resumed` is the step that the run resumes from."""
        self._folder, self._resumed = folder, resumed
        self._writer: SummaryWriter | None = None
        self._failed = False

    def interval(self, row: Mapping[str, object], values: Mapping[str, float], step: int) -> None:
        """Add `values` as train/NAME, and the loader columns of `row` as loader/NAME."""
        scalars: dict[str, float] = {f"train/{name}": value for name, value in values.items()}
        for column, tag in LOADER.items():
            if isinstance(number := row.get(column), int | float):
                scalars[f"loader/{tag}"] = number
        self.add(scalars, step)

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Add scalars under their full names."""

        def write(writer: SummaryWriter) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

        self._write(write)

    def image(self, name: str, pixels_HWC: NDArray[np.uint8], step: int) -> None:
        """Add an image, uint8 (H, W, 3)."""
        self._write(lambda writer: writer.add_image(name, pixels_HWC, step, dataformats="HWC"))

    def close(self) -> None:
        """Close the file. May be called twice, or without a file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _write(self, write: Callable[[SummaryWriter], Any]) -> None:
        if self._failed:
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard.writer import SummaryWriter

                # After a resume, TensorBoard hides the events of the steps that are repeated.
                purge = self._resumed + 1 if self._resumed else None
                self._writer = SummaryWriter(str(self._folder), purge_step=purge, flush_secs=10**6)
            write(self._writer)
            self._writer.flush()
        except OSError:
            self._writer, self._failed = None, True
            raise


def pixels(fig: Figure) -> NDArray[np.uint8]:
    """Render a figure as RGB, uint8 (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(fig)
    canvas.draw()  # type: ignore[no-untyped-call]
    rgba = np.asarray(canvas.buffer_rgba(), dtype=np.uint8)  # type: ignore[no-untyped-call]
    return np.ascontiguousarray(rgba[..., :3])
