"""`rotate4` compared with plain torch, compiled torch, and a copy of as many bytes.

    python benchmarks/rotate4.py --output rotate4.jsonl --plot rotate4.png

Rotation and normalisation read each crop once and write four views. The share of the bandwidth of a
plain copy on the same device shows how much faster they could be. The same work from regions of
random sizes, which are resized on the device, is timed as well: it moves other bytes, and is
dominated by arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from harness.plots import bars
from harness.results import Row, TimingOptions, against, image_row, log, publish, run_program
from harness.timing import Window, abba, synchronize, window
from pipelines.batch import DTYPES, Regions
from pipelines.device.rotate import rotate4
from pipelines.sampling.crops import crop_boxes
from pipelines.spec import IMAGENET, LoaderSpec, Normalize, Precision, RandomResizedCrop

COLUMNS = ("cpu_seconds_per_1k_images", "gigabytes_per_s", "share_of_copy", "target", "met")
REGIONS = "rotate4 of regions"
TARGET = 0.85
"""Target for `rotate4` on a GPU: share of a copy's bandwidth."""


@dataclass(frozen=True)
class Arguments(TimingOptions):
    """Four normalised views of uint8 crops in device memory: our kernel, torch, DALI."""

    size: int = 224
    """Side of the crops in pixels."""
    batch_size: int = 64
    """Source images per batch."""
    precision: Precision | None = None
    """Type of the views; by default bf16 on a GPU, else fp32."""
    threads: int = 1
    """Threads of torch on a CPU."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """The device of the crops."""
    compiled: bool = True
    """Also measure torch.compile, which takes a while to compile."""


def plain_views(
    crops: torch.Tensor, *, normalize: Normalize, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what `rotate4` returns in five lines of torch: the baseline.

    Args:
        crops: uint8 (B, S, S, 3).
        normalize: Mean and standard deviation in units of 0 to 255.
        dtype: Type of the views.

    Returns:
        Views (4 B, 3, S, S), channels last, and labels int64 (4 B,).
    """
    mean = torch.tensor(normalize.mean, device=crops.device)
    scale = 1.0 / torch.tensor(normalize.std, device=crops.device)
    plain = ((crops.float() - mean) * scale).to(dtype)
    views = torch.cat([torch.rot90(plain, k, (1, 2)) for k in range(4)])
    labels = torch.arange(4, device=crops.device).repeat_interleave(len(crops))
    return views.permute(0, 3, 1, 2), labels


def main(args: Arguments) -> None:
    """Measure and publish. User errors raise `ValueError`."""
    device = torch.device(args.device)
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    torch.set_num_threads(args.threads)
    dtype = DTYPES[precision]
    shape = (args.batch_size, args.size, args.size, 3)
    crops = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    regions = _regions(args.batch_size, args.size, device)
    options: dict[str, Any] = {"normalize": IMAGENET, "dtype": dtype}
    # New memory costs time as well: torch gets it from the system in each call.
    out = rotate4(crops, **options)[0]
    contestants: dict[str, Callable[[], object]] = {
        "rotate4": functools.partial(rotate4, crops, **options),
        "rotate4, same output": functools.partial(rotate4, crops, out=out, **options),
        REGIONS: functools.partial(rotate4, regions, out=out, **options),
        "plain torch": functools.partial(plain_views, crops, **options),
    }
    if args.compiled:
        compiled = torch.compile(plain_views, dynamic=False)
        contestants["compiled torch"] = functools.partial(compiled, crops, **options)
    if device.type == "cuda":
        try:
            contestants["inside DALI"] = _dali(crops, dtype)
        except ImportError as error:
            log(f"left out: DALI: {error}")
    written = crops.numel() * 4 * dtype.itemsize
    moved = crops.numel() + written
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    contestants["copy of as many bytes"] = functools.partial(target.copy_, source)
    rows = _measure(
        contestants,
        args,
        device,
        dict.fromkeys(contestants, moved) | {REGIONS: regions.pixels.numel() + written},
        f"{args.size}px batch {args.batch_size} {precision}",
    )
    publish(rows, args.output, COLUMNS)
    bars(rows, args.plot, title="Four views of resident crops", ours=("rotate4",))


def _measure(
    contestants: dict[str, Callable[[], object]],
    args: Arguments,
    device: torch.device,
    moved: dict[str, int],
    variant: str,
) -> list[Row]:
    windows: dict[str, list[Window]] = {name: [] for name in contestants}
    for work in contestants.values():
        for _ in range(3):
            work()
    synchronize(device)
    for name in abba(tuple(contestants), args.repeats):
        batches = _batches(contestants[name], args.batch_size, device)
        windows[name].append(window(batches, seconds=args.seconds, device=device))
    bandwidth = {
        name: sum(w.images for w in ws) / sum(w.seconds for w in ws) * moved[name] / args.batch_size
        for name, ws in windows.items()
    }
    shares = {name: rate / bandwidth["copy of as many bytes"] for name, rate in bandwidth.items()}
    # One CPU thread is limited by arithmetic, not by memory: no target on a CPU.
    targets = {
        name: against(shares[name], TARGET, "higher")
        for name in ("rotate4", "rotate4, same output")
        if device.type == "cuda"
    }
    return [
        image_row(
            "rotate4",
            name,
            variant,
            windows[name],
            views=4,
            threads=args.threads,
            device=device,
            gigabytes_per_s=round(bandwidth[name] / 1e9, 3),
            share_of_copy=round(shares[name], 3),
            **targets.get(name, {}),
        )
        for name in contestants
    ]


def _regions(batch: int, size: int, device: torch.device) -> Regions:
    """Return noise in the shapes of `RandomResizedCrop` on images of 500 x 375 pixels."""
    spec = LoaderSpec(data="synthetic", batch_size=batch, crop=RandomResizedCrop(size))
    indices = np.arange(batch)
    boxes = crop_boxes(
        spec,
        epoch=0,
        indices=indices,
        heights=np.full(batch, 375, np.int32),
        widths=np.full(batch, 500, np.int32),
    )
    counts = 3 * boxes[:, 2].astype(np.int64) * boxes[:, 3]
    return Regions(
        pixels=torch.randint(0, 256, (int(counts.sum()),), dtype=torch.uint8).to(device),
        offsets=torch.from_numpy(np.cumsum(counts) - counts).to(device),
        shapes=torch.from_numpy(np.ascontiguousarray(boxes[:, 2:4])).to(device),
        flips=torch.from_numpy(boxes[:, 4] != 0).to(device),
        side=size,
    )


def _batches(work: Callable[[], object], images: int, device: torch.device) -> Iterator[int]:
    """Call `work` for ever; synchronize every 16 calls, or only queueing would be timed."""
    calls = 0
    while True:
        work()
        calls += 1
        if calls % 16 == 0:
            synchronize(device)
        yield images


def _dali(crops: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """Return a call that makes the same views with DALI's operators, from crops on the GPU."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    kinds = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16}
    # DALI has no bf16; fp16 is as wide.
    kind = kinds.get(dtype, types.FLOAT16)
    nearest = types.INTERP_NN
    pipe = Pipeline(batch_size=len(crops), num_threads=1, device_id=crops.device.index or 0)
    with pipe:
        source = fn.external_source(
            source=lambda: crops, device="gpu", batch=True, layout="HWC", no_copy=True
        )
        turned = [
            source,
            *(
                fn.rotate(source, angle=90.0 * k, keep_size=True, interp_type=nearest)
                for k in (1, 2, 3)
            ),
        ]
        views = [
            fn.crop_mirror_normalize(
                view,
                dtype=kind,
                output_layout="HWC",
                mean=list(IMAGENET.mean),
                std=list(IMAGENET.std),
            )
            for view in turned
        ]
        pipe.set_outputs(*views)
    pipe.build()
    run: Callable[[], object] = pipe.run
    return run


if __name__ == "__main__":
    run_program(main, Arguments, "rotate4")
