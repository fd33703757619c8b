"""Spliced decoding, of the segments under a crop only: speed-up, and proof of equal pixels.

    python benchmarks/splice.py --data train.beton --crops 8 --output splice.jsonl

Takes random crops (`RandomResizedCrop`) of every image of a beton with restart markers twice: from
the whole image, and from the small JPEG of the segments under the crop. The FFCV engine's own
kernel does both on one thread, and all bytes are compared. Decoding and cropping are timed, not
resizing. Whole batches alternate (ABBA); a repetition is one pass over all images and crops.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.photographs import PHOTOGRAPHS, containers
from harness.plots import bars
from harness.results import RepeatOptions, Row, image_row, publish, ratio_row, row, run_program
from harness.timing import Window, abba
from pipelines.beton.reader import Beton
from pipelines.beton.splicing import splice_batch
from pipelines.engines.ffcv import kernels
from pipelines.sampling.crops import crop_boxes
from pipelines.spec import LoaderSpec, RandomResizedCrop

_BATCH = 50
COLUMNS = ("images_per_cpu_second", "bytes_kept_share", "differing_bytes", "target", "met")


@dataclass(frozen=True)
class Arguments(RepeatOptions):
    """Exactness and speed-up of spliced decoding."""

    data: str | None = None
    """A beton with its side file of segments; by default one is made of generated photographs."""
    images: int = 1000
    """Use at most this many images, from the start of the beton."""
    crops: int = 4
    """Random crops of each image."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of a crop's share of the image's area."""
    count: int = PHOTOGRAPHS
    """Photographs to generate without --data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops < 1 or self.images < 1:
            raise ValueError("--crops and --images must be at least 1")


def main(args: Arguments) -> None:
    """Measure and publish. User errors raise `ValueError` or `OSError`."""
    with ExitStack() as stack:
        data = args.data
        if data is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            data = str(containers(None, Path(folder), count=args.count).small(markers=True))
        beton = stack.enter_context(Beton.open(data))
        if beton.segments is None:
            raise ValueError(f"{data} has no side file of segments")
        rows = _measure(beton, data, args)
    publish(rows, args.output, COLUMNS)
    bars(rows[:2], args.plot, title="Decoding the region of a crop, one thread", ours=("spliced",))


def _measure(beton: Beton, data: str, args: Arguments) -> list[Row]:
    # --help must work without FFCV.
    from pipelines.engines.ffcv.loader import RingLoader, Step

    batch = min(_BATCH, len(beton), args.images)
    spec = LoaderSpec(
        data=data,
        engine="ffcv",
        batch_size=batch,
        crop=RandomResizedCrop(scale=args.scale),
        resize="device",
    )
    loader = RingLoader(beton, spec, 1)
    state = loader.tables.state
    # Samples without a record are decoded whole.
    records = np.zeros_like(state.records)
    records.flags.writeable = False
    states = {"whole": state._replace(records=records), "spliced": state}
    count = min(args.images, len(beton)) // batch * batch
    differing, kept = 0, []
    # Wall and CPU seconds; the first repetition is not counted.
    taken = {name: np.zeros((args.repeats + 1, 2)) for name in states}
    for crop in tqdm(range(args.crops), unit="crop", leave=False, disable=None):
        for first in range(0, count, batch):
            indices = np.arange(first, first + batch)
            loader.tables.begin(Step(crop, 0, indices, np.ones(batch, np.bool_)), 0)
            regions = loader.tables.regions()
            offsets = regions.offsets.numpy()
            pixels = {name: np.empty(len(regions.pixels), np.uint8) for name in states}
            done = dict.fromkeys(states, 0)
            for name in abba(tuple(states), args.repeats + 1):
                begin = _clocks()
                kernels.decode_lane(indices, pixels[name], offsets, 0, states[name], 0, 1)
                taken[name][done[name]] += _clocks() - begin
                done[name] += 1
                if state.status.any():
                    i = int(indices[np.flatnonzero(state.status)[0]])
                    raise ValueError(f"{data}: sample {i} cannot be decoded")
            differing += int((pixels["whole"] != pixels["spliced"]).sum())
            kept += _kept(beton, spec, crop, indices)
    windows = {
        name: [Window(count * args.crops, *values.tolist()) for values in passes[1:]]
        for name, passes in taken.items()
    }
    return _rows(windows, Path(data).name, differing, float(np.mean(kept)), args)


def _clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def _kept(beton: Beton, spec: LoaderSpec, epoch: int, indices: np.ndarray) -> list[float]:
    """Return the spliced JPEGs' sizes as shares of the samples' sizes."""
    heights, widths = beton.heights[indices], beton.widths[indices]
    boxes = crop_boxes(spec, epoch=epoch, indices=indices, heights=heights, widths=widths)
    streams, _ = splice_batch(beton, indices, boxes)
    shares: list[float] = (np.array([len(s) for s in streams]) / beton.sizes[indices]).tolist()
    return shares


def _rows(
    windows: dict[str, list[Window]], data: str, differing: int, kept: float, args: Arguments
) -> list[Row]:
    device = torch.device("cpu")
    crops = windows["whole"][0].images
    variant = f"{data} crops {args.scale[0]:g}-{args.scale[1]:g} of the area"
    rows = [
        image_row("splice", name, variant, taken, views=1, threads=1, device=device, **more)
        for (name, taken), more in zip(
            windows.items(), ({}, {"bytes_kept_share": round(kept, 4)}), strict=True
        )
    ]
    rows.append(
        ratio_row(
            "splice",
            "spliced / whole",
            windows["spliced"],
            windows["whole"],
            target=None,
            device=device,
        )
    )
    exact = row(
        "splice",
        "bytes that splicing changes",
        variant,
        [float(differing)],
        unit="bytes",
        device=device,
        order="",
        crops=crops,
        differing_bytes=differing,
        target=0,
        better="lower",
    )
    return [*rows, exact]


if __name__ == "__main__":
    run_program(main, Arguments, "splice")
