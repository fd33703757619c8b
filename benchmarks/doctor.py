"""Bottleneck finder: every stage of training alone, on your data and machine, with its ceiling.

    python benchmarks/doctor.py --data train.beton --backbone resnet50

Measures reading, entropy decoding, decoding, resizing, loading, transfer, rotation and training,
for a second or two each. The last lines name the slowest stage and say what to change.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from contestants.stages import Stage, StageOptions, decoding_threads, measure_stages
from data.photographs import PHOTOGRAPHS, containers
from harness.plots import bars
from harness.results import Row, log, publish, row, run_program

ADVICE = {
    "read": "the disk is slower than all other stages: put the beton on a local disk, shrink its "
    "images (to_beton --max-side 500), or make it fit into memory",
    "loader": "decoding is slower than all other stages",
    "bus": "the transfer of crops to the device is slowest: check its PCIe lanes, lower --size",
    "rotate": "rotation and normalisation are slowest: on a GPU, check for other processes on it; "
    "on a CPU, lower --size",
    "step": "the network is slowest, as it should be: the loader keeps up. To train faster, try "
    "bf16, compile, cuda_graph (benchmarks/train_step.py) or smaller images in the first epochs "
    "(train.resolution-schedule)",
}


@dataclass(frozen=True)
class Arguments(StageOptions):
    """Find the slowest stage of training, and what to change."""

    data: str | None = None
    """A beton or folder; by default photographs are generated."""
    count: int = PHOTOGRAPHS
    """Photographs to generate without --data."""


def main(args: Arguments) -> None:
    """Measure, publish and diagnose. User errors raise `ValueError` or `OSError`."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with ExitStack() as stack:
        data = args.data
        if data is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            data = str(containers(None, Path(folder), count=args.count).original(markers=False))
        stages = measure_stages(data, args)
    rows = [_row(stage, data, args) for stage in stages]
    publish(rows, args.output, ("ceiling",))
    lines = diagnose(stages, threads=decoding_threads(args))
    bars(rows, args.plot, title=lines[0])
    for line in lines:
        log(line)


def diagnose(stages: list[Stage], *, threads: int) -> list[str]:
    """Return the slowest stage, by how much, and what to change; one sentence per line.

    Args:
        stages: The measured stages.
        threads: Number of decoding threads.
    """
    slowest, second = sorted((s for s in stages if s.in_pipeline), key=lambda s: s.rate)[:2]
    lines = [
        f"{slowest.name} is the bottleneck: {slowest.rate:,.0f} source images/s; the next stage, "
        f"{second.name}, reaches {second.rate:,.0f}",
        ADVICE[slowest.name],
    ]
    if slowest.name != "loader":
        return lines
    cores = len(os.sched_getaffinity(0))
    by_name = {stage.name: stage for stage in stages}
    if threads < cores:
        lines.append(
            f"{threads} of {cores} allowed cores decode: raise cpu_budget, the share of the cores "
            "for decoding, or set workers, the number of threads"
        )
    else:
        lines.append("all allowed cores decode: add cores, or decode on the GPU (engine=dali)")
    entropy, full = by_name["entropy decoding, one core"], by_name["decoding, one core"]
    if full.rate > 0.5 * entropy.rate:
        lines.append(
            "most of decoding is entropy decoding, whose cost is proportional to the bytes: try "
            "to_beton --restart-markers (decodes only the crop) or --max-side 500"
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
    run_program(main, Arguments, "doctor")
