"""The stages of training, each alone: reading, decoding, loading, sending, turning, the step."""

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
from harness import ceilings
from harness.timing import cpu_seconds, window
from harness.training_step import WARMUP_STEPS, Step, Training, resident_batch, stepping
from PIL import Image

from contestants.ours import Ours
from pipelines.batch import DTYPES
from pipelines.beton.reader import Beton
from pipelines.device.rotate import rotate4
from pipelines.engines.autotune import thread_budget
from pipelines.engines.samples import Samples, encoded, open_samples
from pipelines.imaging.torchvision_decode import crop, decode
from pipelines.spec import IMAGENET, LoaderSpec, RandomResizedCrop, Shard
from rotpred.training.optim import Optim
from rotpred.training.settings import RunSettings

Read = Callable[[int], bytes]


@dataclass(frozen=True)
class Options(Training):
    """How the stages are run."""

    repeats: int = 3
    """Windows of each stage."""
    seconds: float = 1.0
    """Length of a window, at least."""


@dataclass(frozen=True)
class Stage:
    """A stage alone."""

    name: str
    rates: list[float]
    """Source images per second, one for each window."""
    ceiling: str
    """What limits it at best, and how near it comes, in words."""
    in_pipeline: bool = True
    """Whether training goes at most as fast; per-core stages only explain the loader."""

    @property
    def rate(self) -> float:
        """The median."""
        return float(np.median(self.rates))


def decoding_threads(args: Options) -> int:
    """As many as training would use: given ones, or those of its budget beside this device."""
    spec = LoaderSpec(batch_size=args.batch_size, crop=RandomResizedCrop(args.size))
    return args.workers or thread_budget(spec, Shard(), torch.device(args.device)).threads


def examine(data: str, args: Options, *, read: Read | None = None) -> list[Stage]:
    """Measure all stages.

    Args:
        data: a beton or folder.
        args: of the program.
        read: hands out the encoded bytes of a sample, cold; by default from the data's disk.
    """
    device = torch.device(args.device)
    samples = open_samples(data)
    workers = decoding_threads(args)
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    samples = [bytes(encoded(samples, i)) for i in order[:64]]
    if any(p[:2] != b"\xff\xd8" for p in samples):
        raise ValueError(f"{data}: the stages are measured on JPEG images only")
    size = sum(map(len, samples)) / len(samples)
    stages = [_reading(samples, order, size, args, read)]
    per_core = _decoding(samples, size, args)
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
    samples: Samples, order: list[int], size: float, args: Options, read: Read | None
) -> Stage:
    """Encoded bytes from the disk: the system is asked to drop them from memory first."""
    rates = []
    for _ in range(args.repeats):
        with ExitStack() as stack:
            take = read or _reader(samples, stack)
            images, begin = 0, time.perf_counter()
            for i in order:
                take(i)
                images += 1
                if time.perf_counter() - begin >= args.seconds:
                    break
            rates.append(images / (time.perf_counter() - begin))
    rate = float(np.median(rates)) * size
    return Stage("read", rates, f"{rate / 1e6:,.0f} MB/s from the disk, one reader")


def _reader(samples: Samples, stack: ExitStack) -> Read:
    """A function that reads a sample, after its file's pages were dropped."""
    if not isinstance(samples, Beton):
        for i in range(len(samples)):
            with samples.path(i).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return samples.read
    handle = stack.enter_context(samples.path.open("rb")).fileno()
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    # Not through the map: the system keeps pages that are mapped.
    return lambda i: os.pread(handle, int(samples.sizes[i]), int(samples.offsets[i]))


def _decoding(samples: list[bytes], size: float, args: Options) -> list[Stage]:
    """One core: entropy decoding, decoding, and decoding with crop and resize."""
    box = np.zeros(5, np.int32)

    def entropy(data: bytes) -> None:
        with Image.open(BytesIO(data)) as image:
            # An eighth of the size, in grey: all coefficients are read, hardly one is transformed.
            image.draft("L", (1, 1))
            image.load()

    def whole(data: bytes) -> None:
        decode(data)

    def cut(data: bytes) -> None:
        image = decode(data)
        # The mean box of a RandomResizedCrop: about half of the image's area.
        height, width = (max(1, int(0.72 * n)) for n in image.shape[1:])
        box[2:4] = height, width
        crop(image, box, args.size)

    stages = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, work in (
            ("entropy decoding, one core", entropy),
            ("decoding, one core", whole),
            ("decoding, crop and resize, one core", cut),
        ):
            rates = [_per_cpu_second(work, samples, args.seconds) for _ in range(args.repeats)]
            words = f"{float(np.median(rates)) * size / 1e6:,.0f} MB of JPEG per CPU second"
            stages.append(Stage(name, rates, words, in_pipeline=False))
    finally:
        torch.set_num_threads(threads)
    return stages


def _per_cpu_second(work: Callable[[bytes], None], samples: list[bytes], seconds: float) -> float:
    images, cpu, begin = 0, cpu_seconds(), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        work(samples[images % len(samples)])
        images += 1
    return images / (cpu_seconds() - cpu)


def _loading(data: str, workers: int, args: Options) -> Stage:
    """Crops as the engine hands them over, on the host or on the device."""
    player = Ours(
        data=data,
        engine=args.engine,
        output="crops",
        device=args.device,
        size=args.size,
        batch_size=args.batch_size,
        workers=workers,
    )
    player.open()
    try:
        taken = [player.window(args.seconds) for _ in range(args.repeats)]
    finally:
        player.close()
    return Stage("loader", [images / seconds for images, seconds, _ in taken], "")


def _device_stages(args: Options, device: torch.device) -> list[Stage]:
    """The bus, where there is one; turning and normalising; the step."""
    shape = (args.batch_size, args.size, args.size, 3)
    host = torch.randint(0, 256, shape, dtype=torch.uint8)
    stages = []
    peak = ceilings.bus_bytes(device)
    if peak is not None:
        pinned = host.pin_memory()
        rates = _rates(lambda: pinned.to(device, non_blocking=True), args, device)
        moved = float(np.median(rates)) * host[0].numel()
        words = f"{moved / 1e9:.1f} of {peak / 1e9:.1f} GB/s that a large copy reaches"
        stages.append(Stage("bus", rates, words))
    crops, dtype = host.to(device), DTYPES[args.precision]
    rates = _rates(lambda: rotate4(crops, normalize=IMAGENET, dtype=dtype), args, device)
    moved = float(np.median(rates)) * host[0].numel() * (1 + 4 * dtype.itemsize)
    peak = ceilings.copy_bytes(device)
    words = f"{moved / 1e9:.1f} of {peak / 1e9:.1f} GB/s that a copy in memory reaches"
    stages.append(Stage("rotate", rates, words))
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
        window(stepping(step, repeat(batch), device), seconds=args.seconds, device=device)
        for _ in range(args.repeats)
    ]
    rates = [w.images / w.seconds for w in taken]
    peak = ceilings.matmul_flops(device, args.precision)
    done = float(np.median(rates)) * flops
    words = f"{done / 1e12:.3g} of {peak / 1e12:.3g} TFLOP/s that a matrix product reaches"
    return [*stages, Stage("step", rates, words)]


def _rates(work: Callable[[], Any], args: Options, device: torch.device) -> list[float]:
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
