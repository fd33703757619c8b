"""The training step on a batch in device memory: the ceiling for any loader.

    python benchmarks/train_step.py --batch-sizes 64 128 --output train_step.jsonl

Writes a row per batch size and way to run the step: views/s, peak memory, and the operations per
second as a share of what a large matrix product reaches on the same device in the same type. The
ways do not fit into a GPU's memory together. So each runs alone for half of its windows, first in
one order of the ways, then in the opposite order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from harness.ceilings import matmul_flops
from harness.plots import bars
from harness.results import Row, TimingOptions, against, image_row, publish, run_program
from harness.runner import run_alternating
from pipelines.spec import Precision

ON_GPU = torch.cuda.is_available()
Way = Literal[
    "fp32",
    "fp32 compile",
    "fp16",
    "bf16",
    "bf16 compile",
    "bf16 graph",
    "bf16 compile graph",
    "bf16 apex",
    "bf16 compile apex",
]
COLUMNS = (
    "views_per_s",
    "share_of_matmul",
    "peak_device_mib",
    "first_batch_seconds",
    "target",
    "met",
)
TARGET_FOR, TARGET = ("resnet50", 224), 3500.0
"""Network and image side that the target is for, and the target in views/s on a GPU."""


@dataclass(frozen=True)
class Arguments(TimingOptions):
    """Views per second of the training step alone."""

    backbone: str = "resnet50" if ON_GPU else "resnet18_tiny"
    """The network, named as in a recipe."""
    size: int = 224 if ON_GPU else 32
    """Side of the images in pixels."""
    batch_sizes: tuple[int, ...] = (64,) if ON_GPU else (16,)
    """Source images per step; the network sees four times as many views."""
    ways: tuple[Way, ...] = (
        ("bf16", "bf16 compile", "bf16 graph", "bf16 compile graph") if ON_GPU else ("fp32",)
    )
    """Precision, then options: compile (torch.compile), graph (CUDA graph), apex (fused SGD)."""
    threads: int = 1
    """Threads of torch on a CPU."""
    device: str = "cuda" if ON_GPU else "cpu"
    """The device to train on."""


def main(args: Arguments) -> None:
    """Measure and publish. User errors raise `ValueError`."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    ceilings: dict[Precision, float] = {}
    rows: list[Row] = []
    for batch_size in args.batch_sizes:
        configs = {way: _config(way, batch_size, args) for way in args.ways}
        windows, facts = run_alternating(
            configs, repeats=args.repeats, seconds=args.seconds, title="steps", alone=True
        )
        for way, config in configs.items():
            precision = config["precision"]
            if precision not in ceilings:
                ceilings[precision] = matmul_flops(device, precision)
            values = image_row(
                "train_step",
                way,
                f"{args.backbone} {args.size}px batch {batch_size}",
                windows[way],
                views=4,
                threads=args.threads,
                device=device,
                **facts[way],
            )
            flops = values["median"] * values["gigaflop_per_image"] * 1e9
            values["teraflop_per_s"] = round(flops / 1e12, 4)
            values["matmul_teraflop_per_s"] = round(ceilings[precision] / 1e12, 4)
            values["share_of_matmul"] = round(flops / ceilings[precision], 4)
            if device.type == "cuda" and (args.backbone, args.size) == TARGET_FOR:
                values |= against(values["views_per_s"], TARGET, "higher")
            rows.append(values)
    publish(rows, args.output, COLUMNS)
    bars(rows, args.plot, title="The training step alone (source images/s)")


def _config(way: Way, batch_size: int, args: Arguments) -> dict[str, Any]:
    precision, *more = way.split()
    return {
        "kind": "step",
        "backbone": args.backbone,
        "size": args.size,
        "batch_size": batch_size,
        "precision": precision,
        "compile": "compile" in more,
        "cuda_graph": "graph" in more,
        "apex": "apex" in more,
        "device": args.device,
        "torch_threads": args.threads,
    }


if __name__ == "__main__":
    run_program(main, Arguments, "train_step")
