"""Times each stage of training alone: read, decode, load, transfer, rotate, step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from itertools import repeat
from typing import Any

import numpy as np
import torch
from PIL import Image

from contestants.ours import OurLoader
from harness import ceilings
from harness.timing import cpu_seconds, window
from harness.training_step import (
    WARMUP_STEPS,
    Step,
    TrainingOptions,
    resident_batch,
    run_steps,
)
from pipelines.batch import DTYPES
from pipelines.device.rotate import rotate4
from pipelines.engines.autotune import thread_budget
from pipelines.imaging.torchvision_decode import crop, decode
from pipelines.samples import Samples, open_samples
from pipelines.spec import IMAGENET, LoaderSpec, RandomResizedCrop, Shard
from rotpred.training.settings import Optim, RunSettings

Read = Callable[[int], bytes]


@dataclass(frozen=True)
class StageOptions(TrainingOptions):
    """Options of the stages."""

    repeats: int = 3
    """Windows of each stage."""
    seconds: float = 1.0
    """Minimum length of a window."""


@dataclass(frozen=True)
class Stage:
    """Throughput of one stage, measured alone."""

    name: str
    rates: list[float]
    """Source images per second, one per window."""
    ceiling: str
    """The hardware limit and how close the stage comes to it, for the reader."""
    in_pipeline: bool = True
    """Whether the stage limits training; per-core stages only explain the loader."""

    @property
    def rate(self) -> float:
        """Median of `rates`."""
        return float(np.median(self.rates))


def decoding_threads(args: StageOptions) -> int:
    """Return the decoding threads that training would use: as given, or by its CPU budget."""
    spec = LoaderSpec(batch_size=args.batch_size, crop=RandomResizedCrop(args.size))
    return args.workers or thread_budget(spec, Shard(), torch.device(args.device)).threads


def measure_stages(data: str, args: StageOptions, *, read: Read | None = None) -> list[Stage]:
    """Measure all stages.

    Args:
        data: A beton or folder.
        args: Options of the program.
        read: Returns the encoded bytes of a sample, uncached; by default it reads the disk.

    Raises:
        ValueError: The data are not JPEG images.
    """
    device = torch.device(args.device)
    samples = open_samples(data)
    workers = decoding_threads(args)
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    jpegs = [bytes(samples.read(i)) for i in order[:64]]
    if any(jpeg[:2] != b"\xff\xd8" for jpeg in jpegs):
        raise ValueError(f"{data}: the stages are measured on JPEG images only")
    size = sum(map(len, jpegs)) / len(jpegs)
    stages = [_reading(samples, order, size, args, read)]
    per_core = _decoding(jpegs, size, args)
    loader = _loading(data, workers, args)
    alone = per_core[-1].rate * workers
    loader = Stage(
        "loader",
        loader.rates,
        f"{workers} threads x one core's {per_core[-1].rate:,.0f} = {alone:,.0f} images/s "
        f"without splicing: {loader.rate / alone:.0%}",
    )
    stages += [*per_core, loader]
    stages += _device_stages(args, device)
    return stages


def _reading(
    samples: Samples, order: list[int], size: float, args: StageOptions, read: Read | None
) -> Stage:
    """Read encoded bytes from the disk, after asking the system to drop cached pages."""
    rates = []
    for _ in range(args.repeats):
        with ExitStack() as stack:
            read_sample = read or _uncached_reader(samples, stack)
            images, begin = 0, time.perf_counter()
            for i in order:
                read_sample(i)
                images += 1
                if time.perf_counter() - begin >= args.seconds:
                    break
            rates.append(images / (time.perf_counter() - begin))
    rate = float(np.median(rates)) * size
    return Stage("read", rates, f"{rate / 1e6:,.0f} MB/s from the disk, one reader")


def _uncached_reader(samples: Samples, stack: ExitStack) -> Read:
    """Drop the files' cached pages and return a function that reads a sample."""
    beton = samples.beton
    if beton is None:
        for i in range(len(samples)):
            with open(samples.location(i), "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return samples.read
    handle = stack.enter_context(beton.path.open("rb")).fileno()
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    # Not through the memory map: the system keeps mapped pages.
    return lambda i: os.pread(handle, beton.size(i), int(beton.offsets[i]))


def _decoding(jpegs: list[bytes], size: float, args: StageOptions) -> list[Stage]:
    """Measure on one core: entropy decoding, decoding, and decoding with crop and resize."""
    box = np.zeros(5, np.int32)

    def entropy(data: bytes) -> None:
        with Image.open(BytesIO(data)) as image:
            # An eighth of the size, in grey: reads all coefficients, transforms hardly any.
            image.draft("L", (1, 1))
            image.load()

    def full(data: bytes) -> None:
        decode(data)

    def cropped(data: bytes) -> None:
        image = decode(data)
        # The average box of a RandomResizedCrop: about half of the image's area.
        height, width = (max(1, int(0.72 * n)) for n in image.shape[1:])
        box[2:4] = height, width
        crop(image, box, args.size)

    stages = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, work in (
            ("entropy decoding, one core", entropy),
            ("decoding, one core", full),
            ("decoding, crop and resize, one core", cropped),
        ):
            rates = [_per_cpu_second(work, jpegs, args.seconds) for _ in range(args.repeats)]
            ceiling = f"{float(np.median(rates)) * size / 1e6:,.0f} MB of JPEG per CPU second"
            stages.append(Stage(name, rates, ceiling, in_pipeline=False))
    finally:
        torch.set_num_threads(threads)
    return stages


def _per_cpu_second(work: Callable[[bytes], None], jpegs: list[bytes], seconds: float) -> float:
    images, cpu, begin = 0, cpu_seconds(), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        work(jpegs[images % len(jpegs)])
        images += 1
    return images / (cpu_seconds() - cpu)


def _loading(data: str, workers: int, args: StageOptions) -> Stage:
    """Measure the engine alone: uint8 crops on the host or the device, before rotation."""
    contestant = OurLoader(
        data=data,
        engine=args.engine,
        output="crops",
        device=args.device,
        size=args.size,
        batch_size=args.batch_size,
        workers=workers,
    )
    contestant.open()
    try:
        taken = [contestant.window(args.seconds) for _ in range(args.repeats)]
    finally:
        contestant.close()
    return Stage("loader", [images / seconds for images, seconds, _ in taken], "")


def _device_stages(args: StageOptions, device: torch.device) -> list[Stage]:
    """Measure the bus (GPU only), rotation with normalisation, and the training step."""
    shape = (args.batch_size, args.size, args.size, 3)
    host = torch.randint(0, 256, shape, dtype=torch.uint8)
    stages = []
    peak = ceilings.bus_bytes(device)
    if peak is not None:
        pinned = host.pin_memory()
        rates = _rates(lambda: pinned.to(device, non_blocking=True), args, device)
        moved = float(np.median(rates)) * host[0].numel()
        ceiling = f"{moved / 1e9:.1f} of {peak / 1e9:.1f} GB/s that a large copy reaches"
        stages.append(Stage("bus", rates, ceiling))
    crops, dtype = host.to(device), DTYPES[args.precision]
    rates = _rates(lambda: rotate4(crops, normalize=IMAGENET, dtype=dtype), args, device)
    moved = float(np.median(rates)) * host[0].numel() * (1 + 4 * dtype.itemsize)
    peak = ceilings.copy_bytes(device)
    ceiling = f"{moved / 1e9:.1f} of {peak / 1e9:.1f} GB/s that a copy in memory reaches"
    stages.append(Stage("rotate", rates, ceiling))
    run = RunSettings(
        device=args.device,
        precision=args.precision,
        compile=args.compile,
        cuda_graph=args.cuda_graph,
    )
    batch = resident_batch(args.size, args.batch_size, precision=args.precision, device=args.device)
    plain = RunSettings(device=args.device, precision=args.precision)
    optim = Optim(lr=1e-3)
    counted = Step(args.backbone, run=plain, optim=optim, batch_size=args.batch_size)
    flops = counted.flops(batch) / args.batch_size
    step = Step(args.backbone, run=run, optim=optim, batch_size=args.batch_size)
    for _ in range(WARMUP_STEPS):
        step(batch)
    taken = [
        window(run_steps(step, repeat(batch), device), seconds=args.seconds, device=device)
        for _ in range(args.repeats)
    ]
    rates = [w.images / w.seconds for w in taken]
    peak = ceilings.matmul_flops(device, args.precision)
    done = float(np.median(rates)) * flops
    ceiling = f"{done / 1e12:.3g} of {peak / 1e12:.3g} TFLOP/s that a matrix product reaches"
    return [*stages, Stage("step", rates, ceiling)]


def _rates(work: Callable[[], Any], args: StageOptions, device: torch.device) -> list[float]:
    def batches() -> Iterator[int]:
        while True:
            for _ in range(8):
                work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            yield 8 * args.batch_size

    work()
    taken = [window(batches(), seconds=args.seconds, device=device) for _ in range(args.repeats)]
    return [w.images / w.seconds for w in taken]
