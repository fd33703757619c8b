"""Making a beton: ours, which passes JPEG files through, against FFCV's writer, which encodes anew.

    python benchmarks/convert.py --data imagenet/val --output convert.jsonl

Same images, same number of worker processes, whose time is counted. Ours follows every Huffman
code, too, to see that an image is sound (header check: reads its markers only), and reads the
finished file back. The bytes that restart markers and their side file add are in the rows.
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
from harness.results import Row, Timing, image_row, publish, ratio_row, row, start
from harness.runner import compete

COLUMNS = ("cpu_seconds_per_1k_images", "megabytes", "bytes_added_percent", "target", "met")
TARGETS = {
    "to_beton, no markers": 4.0,
    "to_beton, no markers, header check": 4.0,
    "to_beton, restart markers": None,
}
"""How many times as many images per CPU second as FFCV's writer. The default check follows every
Huffman code of an image; --check header reads its markers only. Restart markers have no target."""
MOST_ADDED_PERCENT = 2.0


@dataclass(frozen=True)
class Arguments(Timing):
    """Speed and size of conversions: to_beton with and without restart markers, stock FFCV."""

    data: str | None = None
    """A folder of JPEG files; without it, photographs are made. Betons are written beside it, into
    a temporary folder."""
    count: int = PHOTOGRAPHS
    """Photographs that are made where no data are given."""
    max_side: int | None = None
    """Shrink images whose longer side has more pixels; by default they are stored as they are
    (by FFCV: encoded anew in their own size)."""
    workers: int = 0
    """Worker processes; 0: one for each allowed core."""


def main(args: Arguments) -> None:
    """Measure, publish; `ValueError` or `OSError` in words."""
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
    windows, facts = compete(
        configs,
        repeats=args.repeats,
        seconds=args.seconds,
        untimed=("written",),
        title="conversions",
    )
    side = "own size" if args.max_side is None else f"at most {args.max_side}px"
    plain = facts["to_beton, no markers"]
    rows = []
    for name in configs:
        fact = facts[name]
        # Of the samples, and of what lies beside them (manifest, segments), against plain.
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
    """What markers and their side file add. The same at every conversion: there is one value."""
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
        met=added <= MOST_ADDED_PERCENT,
    )


if __name__ == "__main__":
    start(main, Arguments, "convert")
