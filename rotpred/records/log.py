"""The log of a run: recipe, log rows, results and figures in the run folder.

    with lock(out, recipe.name), RunLog(out, recipe, Rank(), total_steps=900) as log:
        log.interval(step=50, epoch=0, values={"loss": 1.2}, images=3200, views=12800,
                     wait_seconds=0.4, seconds=9.1)
        log.result("rotation", metric="accuracy", value=68.4, unit="%", n=40000)

Only rank 0 writes. On other ranks every method returns at once, so callers need not check the rank.
Logging must never end a training run: a full disk or a closed pipe costs one warning and the run
continues. Nothing here waits for a GPU or for another process.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from pipelines.storage import replaced, write_json
from rotpred.distributed import Rank
from rotpred.records.console import configure_logging, describe
from rotpred.records.folder import DONE, environment, lock, read_results, read_rows, rss_mib
from rotpred.records.jsonl import JsonlWriter
from rotpred.records.progress import Progress
from rotpred.records.recipe_json import plain
from rotpred.records.tensorboard import TensorBoardWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RunLog", "configure_logging", "lock", "read_results", "read_rows"]

logger = logging.getLogger(__name__)


class RunLog:
    """Writes one run folder. A context manager; the module docstring has an example."""

    def __init__(
        self,
        out: Path,
        recipe: object,
        rank: Rank,
        total_steps: int,
        *,
        start_step: int = 0,
    ) -> None:
        """Write nothing yet; files are created on entering the context.

        Args:
            out: The run folder, created if missing. One job per folder: see `lock`.
            recipe: A frozen dataclass. Its `name` field, or else its class name, names it in
                results.
            rank: This process; all processes of the job make the same steps, and rank 0 writes.
            total_steps: Steps of the whole run, for the time left and the progress bar.
            start_step: The step that the run resumes from. Later rows of log.jsonl belong to steps
                that are about to be repeated: they are dropped before the first new row, and
                TensorBoard hides its own.
        """
        self.out = out
        self._recipe = recipe
        self._recipe_name = str(getattr(recipe, "name", None) or type(recipe).__name__)
        self._rank = rank
        self._total_steps = total_steps
        self._step = start_step
        self._warned = False
        self._seconds_per_step: float | None = None
        self._results: list[dict[str, object]] = []
        self._rows = JsonlWriter(out / "log.jsonl", after=start_step)
        self._scalars = TensorBoardWriter(out / "tensorboard", resumed=start_step)
        self._progress: Progress | None = None
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        """Create the folder, write recipe.json and env.json, and delete done.json.

        Earlier results stay until the first new one, which replaces them all: they may belong to
        settings other than the new recipe.json.

        Raises:
            OSError: The folder cannot be created or is not writable.
            ValueError: results.json exists and is not a list of results.
        """
        if not self._rank.main:
            return self
        for folder in ("checkpoints", "figures", "tensorboard"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        if not os.access(self.out, os.W_OK):
            raise PermissionError(errno.EACCES, "the run folder is not writable", str(self.out))
        if not logging.getLogger("rotpred").hasHandlers():
            configure_logging()
        read_results(self.out / "results.json")  # raises if the file is not ours to replace
        (self.out / DONE).unlink(missing_ok=True)
        with self._keeps_going():
            write_json(self.out / "recipe.json", plain(self._recipe))
            write_json(
                self.out / "env.json", environment(self._rank.device, world=self._rank.world)
            )
        self._progress = Progress(self._recipe_name, self._total_steps, start=self._step)
        return self

    def __exit__(self, *_exc: object) -> None:
        """Close the progress bar and TensorBoard's file. Results are already on disk."""
        with self._keeps_going():
            if self._progress is not None:
                self._progress.close()
        self._progress = None
        with self._keeps_going():
            self._scalars.close()

    def tick(self, step: int) -> None:
        """Update the progress bar. Reads no tensor: cheap enough for every step."""
        if self._progress is not None:
            with self._keeps_going():
                self._progress.update(step)

    def interval(
        self,
        *,
        step: int,
        epoch: int,
        values: Mapping[str, float],
        images: int,
        views: int,
        wait_seconds: float,
        seconds: float,
    ) -> None:
        """Record one log interval: a row of log.jsonl, a console line, TensorBoard scalars.

        Args:
            step: Steps since the beginning of the run.
            epoch: The epoch of the step, from 0.
            values: Means over the interval, by name; "loss" and "accuracy" (percent) have their
                own format on the console. A value that is not finite is null in log.jsonl.
            images: Source images that THIS process consumed in the interval. The logged
                throughput is that of all processes, which step together.
            views: Network inputs made from these images: four times as many with rotate4.
            wait_seconds: Time that this process waited for its loader.
            seconds: Wall time of the interval.
        """
        if not self._rank.main:
            return
        steps, self._step = step - self._step, step
        if steps > 0 and seconds > 0:
            # Smoothed: one interval may include a checkpoint, the first one compilation.
            now, last = seconds / steps, self._seconds_per_step
            self._seconds_per_step = now if last is None else 0.7 * last + 0.3 * now
        left = None
        if self._seconds_per_step is not None:
            left = max(0, self._total_steps - step) * self._seconds_per_step
        rate = self._rank.world / seconds if seconds > 0 else 0.0
        row: dict[str, object] = {
            "step": step,
            "epoch": epoch,
            **{k: float(v) if math.isfinite(v) else None for k, v in values.items()},
            "images_per_s": round(images * rate, 2),
            "views_per_s": round(views * rate, 2),
            "data_wait_percent": round(100 * min(1.0, wait_seconds / seconds), 2)
            if seconds > 0
            else 0,
            "seconds": round(seconds, 4),
            "seconds_left": None if left is None else round(left, 1),
            "rss_mib": rss_mib(),
            "time": round(time.time(), 3),
        }
        if self._rank.device.type == "cuda":
            row["cuda_peak_mib"] = round(
                torch.cuda.max_memory_allocated(self._rank.device) / 2**20, 1
            )
        if self._progress is not None:
            self._progress.mark_logged()
        self.tick(step)
        logger.info("%s", describe(row, values=values, total_steps=self._total_steps))
        with self._keeps_going():
            self._rows.append(row)
            self._scalars.interval(row, values, step)

    def has_validation(self, step: int) -> bool:
        """Return whether log.jsonl has a validation of this step, from a run that was cut then."""
        path = self.out / "log.jsonl"
        rows = read_rows(path) if path.exists() else []
        return any(
            row.get("step") == step and any(k.startswith("val/") for k in row) for row in rows
        )

    def validation(self, *, step: int, values: Mapping[str, float]) -> None:
        """Record a validation in the middle of a run: a row, a console line, TensorBoard scalars.

        Args:
            step: Steps since the beginning of the run.
            values: Percentages by name. The row and TensorBoard call them val/NAME.
        """
        if not self._rank.main:
            return
        named = {f"val/{name}": float(value) for name, value in values.items()}
        logger.info(
            "step %d  validation  %s",
            step,
            "  ".join(f"{name} {value:.2f} %" for name, value in values.items()),
        )
        with self._keeps_going():
            self._rows.append({"step": step, **named, "time": round(time.time(), 3)})
            self._scalars.add(named, step)

    def result(
        self,
        benchmark: str,
        *,
        metric: str,
        value: float,
        unit: str,
        n: int,
        checkpoint_sha256: str | None = None,
        seconds: float | None = None,
        **extra: object,
    ) -> None:
        """Add a row to results.json and log it to the console.

        The row replaces an earlier one of this log with the same benchmark, metric and recipe, so
        the file cannot contradict itself.

        Args:
            benchmark: What was measured, as in docs/protocols.md.
            metric: "accuracy", "top1/res4", ...
            value: In `unit`; must be finite.
            unit: "%", "images/s", ...
            n: Number of samples that the value is a mean over.
            checkpoint_sha256: SHA-256 of the weights that were evaluated.
            seconds: Duration of the measurement; by default the time since this log was created.
            extra: Further JSON fields, for example `chance=25.0`.

        Raises:
            ValueError: The value is not finite: JSON cannot hold it and a table should not.
        """
        if not self._rank.main:
            return
        if not math.isfinite(value):
            raise ValueError(f"result {benchmark} {metric} is {value}; it must be finite")
        row: dict[str, object] = {
            "benchmark": benchmark,
            "metric": metric,
            "value": float(value),
            "unit": unit,
            "n": n,
            "checkpoint_sha256": checkpoint_sha256,
            "recipe": self._recipe_name,
            "seconds": round(time.monotonic() - self._began if seconds is None else seconds, 1),
            **{key: plain(item) for key, item in extra.items()},
        }
        key = ("benchmark", "metric", "recipe")
        self._results = [r for r in self._results if any(r.get(k) != row[k] for k in key)]
        self._results.append(row)
        logger.info("%s  %s %.4g %s  (n = %s)", benchmark, metric, value, unit, f"{n:,}")
        with self._keeps_going():
            write_json(self.out / "results.json", self._results)

    def figure(self, name: str, fig: Figure) -> None:
        """Write figures/NAME.png, and add it to TensorBoard at the current step."""
        if not self._rank.main:
            return
        from PIL import Image

        from rotpred.records.tensorboard import pixels

        image = pixels(fig)
        with self._keeps_going():
            with replaced(self.out / "figures" / f"{name}.png") as temporary:
                Image.fromarray(image).save(temporary, format="PNG")
            self._scalars.image(name, image, self._step)

    @contextmanager
    def _keeps_going(self) -> Iterator[None]:
        """Catch `OSError` from writes; log the first one of the run as a warning."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "cannot write to the run folder %s (%s): the run continues, its log may be "
                    "incomplete", self.out, error,
                )  # fmt: skip
