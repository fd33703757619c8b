"""What decoding only the segments under a crop saves, and that it changes no pixel.

    python benchmarks/splice.py train.beton --crops 8

Cuts random crops (`RandomResizedCrop`) of every picture of a beton with restart markers twice, from
the whole picture and from the small JPEG of the segments under the crop, by the FFCV engine's own
kernel on one thread. All bytes are compared. What is timed is decoding and cutting, not resizing;
whole batches alternate (ABBA) and processor time is counted. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import tyro
from timing import abba
from tqdm import tqdm

from pipelines import kernels
from pipelines.augment import boxes
from pipelines.beton import Beton
from pipelines.ffcv_loader import RingLoader, Step
from pipelines.spec import LoaderSpec, RandomResizedCrop
from pipelines.splice import splice_batch
from rotpred.runfolder import cpu_model

_BATCH = 50


@dataclass(frozen=True)
class Arguments:
    """Exactness and gain of spliced decoding: a JSON line on stdout."""

    data: tyro.conf.Positional[str]
    """A beton with its side file of segments."""
    pictures: int = 1000
    """Use at most this many, from the first on."""
    crops: int = 4
    """Random crops of each picture."""
    repeats: int = 5
    """Times that each batch of crops is decoded either way, after one that is not timed."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of a crop's share of the picture's area."""


def main(args: Arguments) -> dict[str, object]:
    """Measure one beton."""
    if args.crops < 1 or args.repeats < 1 or args.pictures < 1:
        raise ValueError("--crops, --repeats and --pictures must be at least 1")
    with Beton.open(args.data) as beton:
        if beton.segments is None:
            raise ValueError(f"{args.data}: there is no side file of segments beside it")
        batch = min(_BATCH, len(beton), args.pictures)
        spec = LoaderSpec(
            data=args.data,
            engine="ffcv",
            batch_size=batch,
            crop=RandomResizedCrop(scale=args.scale),
            resize="device",
        )
        loader = RingLoader(beton, spec, 1)
        state = loader.tables.state
        records = np.zeros_like(state.records)
        records.flags.writeable = False
        states = {"whole": state._replace(records=records), "spliced": state}
        count = min(args.pictures, len(beton)) // batch * batch
        differing, kept = 0, []
        rates = []
        for crop in tqdm(range(args.crops), unit="crop", leave=False, disable=None):
            seconds = {name: np.zeros(args.repeats + 1) for name in states}
            for first in range(0, count, batch):
                indices = np.arange(first, first + batch)
                step = Step(crop, 0, indices, np.ones(batch, np.bool_))
                loader.tables.begin(step, 0)
                regions = loader.tables.regions()
                offsets = regions.offsets.numpy()
                pixels = {name: np.empty(len(regions.pixels), np.uint8) for name in states}
                done = dict.fromkeys(states, 0)
                for name in abba(tuple(states), args.repeats + 1):
                    begin = time.process_time()
                    kernels.decode_lane(indices, pixels[name], offsets, 0, states[name], 0, 1)
                    seconds[name][done[name]] += time.process_time() - begin
                    done[name] += 1
                    if state.status.any():
                        i = int(indices[np.flatnonzero(state.status)[0]])
                        raise ValueError(f"{args.data}: sample {i} cannot be decoded")
                differing += int((pixels["whole"] != pixels["spliced"]).sum())
                where = boxes(
                    spec,
                    epoch=crop,
                    indices=indices,
                    heights=beton.heights[indices],
                    widths=beton.widths[indices],
                )
                streams, _ = splice_batch(beton, indices, where)
                lengths = np.array([len(stream) for stream in streams])
                kept += (lengths / beton.sizes[indices]).tolist()
            rates.append({name: s[1:] / count * 1e3 for name, s in seconds.items()})
    speed_ups = [float(v) for r in rates for v in r["whole"] / r["spliced"]]
    return {
        "benchmark": "splice",
        "data": Path(args.data).name,
        "pictures": count,
        "crops": count * args.crops,
        "differing_bytes": differing,
        "bytes_kept_share": round(float(np.mean(kept)), 4),
        "cpu_seconds_per_1k_whole": round(median(float(v) for r in rates for v in r["whole"]), 4),
        "cpu_seconds_per_1k_spliced": round(
            median(float(v) for r in rates for v in r["spliced"]), 4
        ),
        "speed_up": {
            "median": round(median(speed_ups), 3),
            "min": round(min(speed_ups), 3),
            "max": round(max(speed_ups), 3),
            "repeats": len(speed_ups),
        },
        "device": cpu_model(),
    }


if __name__ == "__main__":
    try:
        print(json.dumps(main(tyro.cli(Arguments))))
    except (ValueError, OSError, ImportError) as problem:
        print(f"splice: {' '.join(str(problem).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
