"""Our loaders compared with others in one run, on the same images, per CPU second.

    python benchmarks/peers.py --data imagenet/val --output peers.jsonl --plot peers.png

The images are shrunk once to 500 pixels, and all contestants read those: as files, as our beton
with restart markers, as a beton of the same bytes without them, or as a beton that FFCV's own
writer made from the files. First all deliver uint8 crops of 224 pixels on the host. Then ours and
mmselfsup's way do the whole job of rotation pretraining: four normalised float32 views. The last
rows compare ratios with targets. Every contestant runs in its own process.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.photographs import PHOTOGRAPHS, SMALL_SIDE, Containers, containers
from harness.plots import bars
from harness.results import Row, TimingOptions, image_row, publish, ratio_row, run_program
from harness.runner import run_alternating
from harness.timing import Window

BOXES = "our boxes, computed beforehand"
OWN = "its own boxes of the same distribution; pixels compared on the central square"
CROPS: dict[str, str] = {
    "ours ffcv": "our boxes, drawn in the run",
    "ours dali": "our boxes, drawn in the run",
    "torchvision PIL": BOXES,
    "torchvision decode_jpeg": BOXES,
    "stock ffcv": OWN,
    "stock ffcv, our bytes": OWN,
    "stock dali": OWN,
    "ours, whole job": "our boxes, drawn in the run",
    "mmselfsup's way": BOXES,
}
TARGETS: tuple[tuple[str, str, float], ...] = (
    ("ours ffcv", "stock ffcv", 1.8),
    ("ours ffcv", "stock ffcv, our bytes", 1.8),
    ("ours ffcv", "torchvision decode_jpeg", 2.0),
    ("ours ffcv", "torchvision PIL", 3.0),
    ("ours dali", "stock dali", 1.15),
    ("ours, whole job", "mmselfsup's way", 4.0),
)
WHOLE = ("ours, whole job", "mmselfsup's way")
COLUMNS = (
    "images_per_cpu_second",
    "cpu_seconds_per_1k_images",
    "first_batch_seconds",
    "rss_mib",
    "pixel_difference",
    "pixel_bias",
    "target",
    "met",
)


@dataclass(frozen=True)
class Arguments(TimingOptions):
    """Our loaders compared with torchvision's, stock FFCV's, stock DALI's and mmselfsup's."""

    data: str | None = None
    """A folder of JPEG files; by default photographs are generated."""
    folder: Path | None = None
    """Folder of the files and betons to compare, which are reused. By default a temporary folder;
    then they are made again each time."""
    count: int = PHOTOGRAPHS
    """Photographs to generate without --data."""
    small_side: int = SMALL_SIDE
    """Longest side in pixels of the images to compare."""
    size: int = 224
    """Side of the crops in pixels."""
    batch_size: int = 64
    """Source images per batch."""
    workers: int = 0
    """Decoding threads, or processes if the peer uses those; 0: one per allowed core."""
    only: tuple[str, ...] = ()
    """Contestants to run; by default all."""


def main(args: Arguments) -> None:
    """Measure and publish. User errors raise `ValueError` or `OSError`."""
    unknown = sorted(set(args.only) - set(CROPS))
    if unknown:
        raise ValueError(f"--only: unknown contestant {unknown[0]!r}; known: {', '.join(CROPS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        made = containers(args.data, folder, count=args.count, small_side=args.small_side)
        rows = _measure(made, args)
    publish(rows, args.output, COLUMNS)
    bars(
        [r for r in rows if r["unit"] == "x"] or rows,
        args.plot,
        title="Images per CPU second: ours as a multiple of the others' (line: target)",
    )


def configs(made: Containers, args: Arguments) -> dict[str, dict[str, Any]]:
    """Return the contestants' configurations by name."""
    workers = args.workers or len(os.sched_getaffinity(0))
    files = made.small_folder()
    spliced = made.small(markers=True)
    ours = {"kind": "ours", "data": spliced, "output": "crops"}
    chosen: dict[str, dict[str, Any]] = {
        "ours ffcv": {**ours, "engine": "ffcv"},
        "ours dali": {**ours, "engine": "dali"},
        "torchvision PIL": {"kind": "pil", "data": files},
        "torchvision decode_jpeg": {"kind": "tensor", "data": files},
        "stock ffcv": {"kind": "ffcv", "data": made.stock()},
        "stock ffcv, our bytes": {"kind": "ffcv", "data": made.small(markers=False)},
        "stock dali": {"kind": "dali", "data": files},
        "ours, whole job": {**ours, "engine": "ffcv", "output": "rotate4"},
        "mmselfsup's way": {"kind": "mmselfsup", "data": files},
    }
    common = {"size": args.size, "batch_size": args.batch_size, "workers": workers}
    return {
        name: {**config, **common, "data": str(config["data"])}
        for name, config in chosen.items()
        if not args.only or name in args.only
    }


def _measure(made: Containers, args: Arguments) -> list[Row]:
    every = configs(made, args)
    device = torch.device("cpu")
    windows: dict[str, list[Window]] = {}
    rows: list[Row] = []
    for group in (
        {name: c for name, c in every.items() if name not in WHOLE},
        {name: c for name, c in every.items() if name in WHOLE},
    ):
        measured, facts = run_alternating(
            group,
            repeats=args.repeats,
            seconds=args.seconds,
            parallel_calls=("difference",),
            title="peers",
        )
        windows |= measured
        for name, config in group.items():
            views = 4 if name in WHOLE else 1
            deliver = "four normalised float32 views" if views == 4 else "uint8 crops"
            rows.append(
                image_row(
                    "peers",
                    name,
                    f"{deliver} {args.size}px batch {args.batch_size}",
                    measured[name],
                    views=views,
                    threads=config["workers"],
                    device=device,
                    data=Path(config["data"]).name,
                    boxes=CROPS[name],
                    **facts[name],
                )
            )
    for ours, theirs, target in TARGETS:
        if ours in windows and theirs in windows:
            pair = windows[ours], windows[theirs]
            name = f"{ours} / {theirs}"
            rows.append(ratio_row("peers", name, *pair, target=target, device=device))
    return rows


if __name__ == "__main__":
    run_program(main, Arguments, "peers")
