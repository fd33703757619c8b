"""Conversion to a beton: ours passes JPEG files through, FFCV's writer re-encodes them.

    python benchmarks/convert.py --data imagenet/val --output convert.jsonl

Both use the same images and number of worker processes, whose CPU time counts. Ours also follows
every Huffman code to check that an image is sound (header check: reads its markers only), and reads
the finished file back. The rows give the bytes that restart markers and their side file add.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.photographs import PHOTOGRAPHS, photographs
from harness.plots import bars
from harness.results import Row, TimingOptions, image_row, publish, ratio_row, row, run_program
from harness.runner import run_alternating

COLUMNS = ("cpu_seconds_per_1k_images", "megabytes", "bytes_added_percent", "target", "met")
TARGETS = {
    "to_beton, no markers": 4.0,
    "to_beton, no markers, header check": 4.0,
    "to_beton, restart markers": None,
}
"""Images per CPU second as a multiple of FFCV's writer's. The default check follows every Huffman
code of an image; --check header reads its markers only. Restart markers have no target."""
MOST_ADDED_PERCENT = 2.0


@dataclass(frozen=True)
class Arguments(TimingOptions):
    """Speed and size of conversions: to_beton with and without restart markers, stock FFCV."""

    data: str | None = None
    """A folder of JPEG files; by default photographs are generated. Betons are written to a
    temporary folder beside it."""
    count: int = PHOTOGRAPHS
    """Photographs to generate without --data."""
    max_side: int | None = None
    """Shrink images whose longer side has more pixels. By default they keep their size: ours stores
    them unchanged, FFCV re-encodes them."""
    workers: int = 0
    """Worker processes; 0: one per allowed core."""


def main(args: Arguments) -> None:
    """Measure and publish. User errors raise `ValueError` or `OSError`."""
    with tempfile.TemporaryDirectory() as folder:
        if args.data is not None and not Path(args.data).is_dir():
            raise ValueError(f"{args.data} is not a folder of JPEG files")
        data = args.data or str(photographs(Path(folder), args.count))
        rows = _measure(data, args)
    publish(rows, args.output, COLUMNS)
    bars(rows[:4], args.plot, title="Conversion to a beton", ours=("to_beton",))


def _measure(data: str, args: Arguments) -> list[Row]:
    workers = args.workers or len(os.sched_getaffinity(0))
    device = torch.device("cpu")
    common = {"data": data, "workers": workers, "max_side": args.max_side}
    configs: dict[str, dict[str, Any]] = {
        "to_beton, no markers": {"kind": "our writer", "markers": False, **common},
        "to_beton, no markers, header check": {
            "kind": "our writer",
            "markers": False,
            "check": "header",
            **common,
        },
        "to_beton, restart markers": {"kind": "our writer", "markers": True, **common},
        "stock ffcv writer": {"kind": "stock writer", **common},
    }
    windows, facts = run_alternating(
        configs,
        repeats=args.repeats,
        seconds=args.seconds,
        parallel_calls=("output_bytes",),
        title="conversions",
    )
    side = "own size" if args.max_side is None else f"at most {args.max_side}px"
    plain = facts["to_beton, no markers"]
    rows = []
    for name in configs:
        fact = facts[name]
        # Samples and side files (manifest, segments), compared with the plain beton's.
        added = fact["payload_bytes"] + fact["side_bytes"]
        added -= plain["payload_bytes"] + plain["side_bytes"]
        rows.append(
            image_row(
                "convert",
                name,
                f"{Path(data).name} {side} workers {workers}",
                windows[name],
                views=1,
                threads=workers,
                device=device,
                megabytes=round(fact["file_bytes"] / 1e6, 3),
                bytes_added_percent=round(100 * added / plain["payload_bytes"], 3),
                **fact,
            )
        )
    for name, target in TARGETS.items():
        pair = windows[name], windows["stock ffcv writer"]
        ratio = f"{name} / stock ffcv writer"
        rows.append(ratio_row("convert", ratio, *pair, target=target, device=device))
    rows.append(_added(rows[2], device))
    return rows


def _added(markers: Row, device: torch.device) -> Row:
    """Return the share of bytes that markers and their side file add, equal in all windows."""
    added = markers["bytes_added_percent"]
    return row(
        "convert",
        "bytes that restart markers add",
        markers["variant"],
        [added],
        unit="%",
        device=device,
        digits=3,
        order="",
        target=MOST_ADDED_PERCENT,
        better="lower",
    )


if __name__ == "__main__":
    run_program(main, Arguments, "convert")
