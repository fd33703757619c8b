"""Convert images to a beton file, or verify one."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from pipelines.beton.reader import verify
from pipelines.datasets.images import Images, open_images
from pipelines.datasets.voc_classification import voc2007
from rotpred.files import replaced
from rotpred.program import drive, leave_if_terminated


@dataclass(frozen=True)
class Arguments:
    """Convert images to a beton file, or verify one. JPEG files keep every coefficient."""

    input: str | None = None
    """A folder of class folders or of images, a list file (`path label` a line),
    torchvision:NAME (such as torchvision:CIFAR10), digits, or with --root the folder of images:
    imagenet-val:TRUTH (the flat folder; TRUTH a file of synsets, or the development kit),
    imagenet-subset:LIST (class folders; LIST of names as SimCLR's 1 % and 10 %),
    inaturalist:JSON (the folder of train_val2018), voc2007:SPLIT (the folder VOC2007; the labels go
    to a .labels.npy file beside the output, and no image may be unusable)."""
    output: Path | None = None
    """The .beton file to write, with its manifest OUTPUT.json beside it, and OUTPUT.segments where
    --restart-markers is on."""
    verify: Path | None = None
    """Check this .beton file, every byte of it, and write nothing."""
    root: Path | None = None
    """Folder that a list's paths are relative to, that the images of KIND:NAME lie in, or where
    torchvision keeps its data."""
    max_side: int | None = None
    """Shrink images whose longer side has more pixels."""
    short_side: int | None = None
    """Shrink images whose shorter side has more pixels. Not with --max-side."""
    quality: int = 90
    """JPEG quality of shrunk images."""
    workers: int = 0
    """Worker processes; 0: one for each allowed core."""
    unlabelled: bool = False
    """Drop labels; take a folder's images wherever they lie."""
    split: Literal["train", "val"] = "train"
    """Part of torchvision:NAME or digits; folders and lists are one part each."""
    budget: int | None = None
    """Unusable files that are left out and listed; with one more nothing is written.
    Default: one in a thousand, at least ten."""
    check: Literal["scan", "header"] = "scan"
    """scan follows every code of an image's pixels; header reads its markers only."""
    restart_markers: bool = True
    """Put restart markers into baseline JPEG files (same pixels, one or two percent longer) and
    write OUTPUT.segments, so that loaders decode only what a crop needs."""
    overwrite: bool = False
    """Replace an existing output, once the new one is complete and verified."""


def main(args: Arguments) -> str:
    """Do what is asked for and return one line about it; `ValueError` or `OSError` in words."""
    if args.verify is not None:
        if args.input is not None or args.output is not None:
            raise ValueError("--verify goes alone")
        found = verify(args.verify)
        against = "checksums" if found.checksums else "structure only: there is no manifest"
        return (
            f"{args.verify}: good: {found.samples} samples ({found.jpegs} JPEG, "
            f"{found.labelled} labelled), {found.payload_bytes / 1e6:.1f} MB, {against}"
        )
    if args.input is None or args.output is None:
        raise ValueError("give --input and --output, or --verify")
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists: give --overwrite to replace it")
    from pipelines.conversion.convert import write_beton  # With numba: too slow to load for --help.

    with contextlib.ExitStack() as stack:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        images, budget = opened(args, stack)
        bar = stack.enter_context(tqdm(total=len(images), unit="img", smoothing=0.1, disable=None))
        made = write_beton(
            images,
            args.output,
            max_side=args.max_side,
            short_side=args.short_side,
            quality=args.quality,
            workers=args.workers,
            budget=budget,
            check=args.check,
            restart_markers=args.restart_markers,
            overwrite=args.overwrite,
            progress=lambda done, _: advance(bar, done),
        )
    marks = made.restarts
    again = ", ".join(f"{count} {why}" for why, count in made.reencoded.items()) or "none"
    return (
        f"{args.output}: {made.samples} samples, {len(made.classes)} classes, "
        f"{args.output.stat().st_size / 1e6:.1f} MB; {made.passed} kept as they were, "
        f"encoded anew: {again}; {made.quarantined} left out"
        + (f" ({args.output}.quarantine.jsonl)" if made.quarantined else "")
        + ("" if marks is None else f"; {marks.cut} with restart markers, {marks.added} bytes")
    )


def opened(args: Arguments, stack: contextlib.ExitStack) -> tuple[Images, int | None]:
    """The images, and how many may be left out.

    VOC2007's labels, several for an image, become NAME.labels.npy beside NAME.beton when the stack
    is left without an error. Their rows go by an image's number: none may be left out.
    """
    assert args.input is not None and args.output is not None
    kind, _, split = args.input.partition(":")
    if kind != "voc2007" or args.unlabelled:
        labelled = not args.unlabelled
        images = open_images(args.input, root=args.root, labelled=labelled, split=args.split)
        return images, args.budget
    if args.root is None:
        raise ValueError(f"{args.input} needs --root: the folder VOC2007")
    if args.budget:
        raise ValueError("--budget is not for voc2007, whose labels need every image")
    found = voc2007(args.root, split=split)
    labels = stack.enter_context(replaced(args.output.with_suffix(".labels.npy")))
    with labels.open("wb") as file:
        np.save(file, found.targets)
    return found.images, 0


def advance(bar: tqdm, done: int) -> None:
    leave_if_terminated()
    bar.update(done - bar.n)


if __name__ == "__main__":
    sys.exit(drive("to_beton", Arguments, main))
