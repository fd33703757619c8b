"""Where does the time go? Every stage alone, on your data and machine, beside its ceiling.

    python benchmarks/doctor.py --data train.beton --backbone resnet50

Reads, entropy-decodes, decodes, resizes, loads, sends, turns and trains, one after the other, each
for a second or two. The slowest stage binds; the last lines name it and say what to change.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from contestants.stages import Options, Stage, decoding_threads, examine
from data.photographs import PHOTOGRAPHS, containers
from harness.plots import bars
from harness.results import Row, publish, row, say, start

ADVICE = {
    "read": "the disk is slower than all that follows: put the beton on a local disk, shrink its "
    "images (to_beton --max-side 500), or let it fit into memory",
    "loader": "decoding is slower than all that follows",
    "bus": "sending crops to the device is the slowest: check its PCIe lanes, lower --size",
    "rotate": "turning and normalising is the slowest: on a GPU this points at another process on "
    "it; on a CPU lower --size",
    "step": "the network is the slowest, as it should be: the loader keeps up. To go on: bf16, "
    "compile, cuda_graph (benchmarks/train_step.py), smaller sides at first (train.resolution-schedule)",
}


@dataclass(frozen=True)
class Arguments(Options):
    """Name the stage of training that binds, and what to change."""

    data: str | None = None
    """A beton or folder; without it, photographs are made."""
    count: int = PHOTOGRAPHS
    """Photographs that are made where no data are given."""


def main(args: Arguments) -> None:
    """Measure, publish, diagnose; `ValueError` or `OSError` in words."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with ExitStack() as stack:
        data = args.data
        if data is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            data = str(containers(None, Path(folder), count=args.count).original(markers=False))
        stages = examine(data, args)
    rows = [_row(stage, data, args) for stage in stages]
    publish(rows, args.output, ("ceiling",))
    lines = diagnose(stages, threads=decoding_threads(args))
    bars(rows, args.plot, title=lines[0])
    for line in lines:
        say(line)


def diagnose(stages: list[Stage], *, threads: int) -> list[str]:
    """The stage that binds, by how much, and what to change; one sentence a line.

    Args:
        stages: as measured.
        threads: that decoded.
    """
    pipeline = sorted((s for s in stages if s.in_pipeline), key=lambda s: s.rate)
    worst, next_one = pipeline[0], pipeline[1]
    lines = [
        f"{worst.name} binds: {worst.rate:,.0f} source images/s; the next stage, {next_one.name}, "
        f"reaches {next_one.rate:,.0f}",
        ADVICE[worst.name],
    ]
    if worst.name != "loader":
        return lines
    cores = len(os.sched_getaffinity(0))
    by_name = {stage.name: stage for stage in stages}
    if threads < cores:
        lines.append(
            f"{threads} of {cores} allowed cores decode: raise cpu_budget, the share of the cores "
            "for decoding, or set workers, the number of threads"
        )
    else:
        lines.append("all allowed cores decode: give the job more cores, or the GPU (engine=dali)")
    entropy, full = by_name["entropy decoding, one core"], by_name["decoding, one core"]
    if full.rate > 0.5 * entropy.rate:
        lines.append(
            "most of decoding is entropy decoding, which only fewer bytes make cheaper: "
            "to_beton --restart-markers (only the crop is decoded), --max-side 500"
        )
    return lines


def _row(stage: Stage, data: str, args: Arguments) -> Row:
    return row(
        "doctor",
        stage.name,
        f"{Path(data).name} {args.size}px batch {args.batch_size}",
        stage.rates,
        unit="images/s",
        device=torch.device(args.device),
        ceiling=stage.ceiling,
        in_pipeline=stage.in_pipeline,
    )


if __name__ == "__main__":
    start(main, Arguments, "doctor")
