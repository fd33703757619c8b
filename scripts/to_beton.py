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
from pipelines.storage import replaced
from rotpred.program import drive, leave_if_terminated


@dataclass(frozen=True)
class Arguments:
    """Convert images to a beton file, or verify one. JPEG files keep every coefficient."""

    input: str | None = None
    """A folder of class folders or of images, a list file (lines of `path label`),
    torchvision:NAME (such as torchvision:CIFAR10), or digits. With --root as the image folder also
    imagenet-val:TRUTH (a flat folder; TRUTH is a file of synsets, or the development kit),
    imagenet-subset:LIST (class folders; LIST of file names, such as SimCLR's 1 % and 10 %),
    inaturalist:JSON (the folder of train_val2018), voc2007:SPLIT (the folder VOC2007; the labels go
    to a .labels.npy file beside the output, and every image must be usable)."""
    output: Path | None = None
    """The .beton file to write. Its manifest OUTPUT.json is written beside it, and with
    --restart-markers also OUTPUT.segments."""
    verify: Path | None = None
    """Check every byte of this .beton file and write nothing."""
    root: Path | None = None
    """Folder of a list's relative paths, of the images of KIND:NAME, or of torchvision's data."""
    max_side: int | None = None
    """Shrink images whose longer side has more pixels."""
    short_side: int | None = None
    """Shrink images whose shorter side has more pixels. Not with --max-side."""
    quality: int = 90
    """JPEG quality of shrunk images."""
    workers: int = 0
    """Worker processes; 0: one per allowed core."""
    unlabelled: bool = False
    """Drop labels; take images at any depth of a folder."""
    split: Literal["train", "val"] = "train"
    """Split of torchvision:NAME or digits; not for folders and lists."""
    budget: int | None = None
    """Largest number of unusable files to leave out and list; with one more, nothing is written.
    Default: one in a thousand, at least ten."""
    check: Literal["scan", "header"] = "scan"
    """scan follows every Huffman code of an image; header reads its markers only."""
    restart_markers: bool = True
    """Put restart markers into baseline JPEG files (same pixels, one or two percent longer) and
    write OUTPUT.segments, so that loaders decode only what a crop needs."""
    overwrite: bool = False
    """Replace an existing output once the new one is complete and verified."""


def main(args: Arguments) -> str:
    """Convert or verify; return a one-line summary. User errors raise `ValueError` or `OSError`."""
    if args.verify is not None:
        if args.input is not None or args.output is not None:
            raise ValueError("--verify does not go with --input or --output")
        found = verify(args.verify)
        checked = "checksums match" if found.checksums else "no manifest: checked structure only"
        return (
            f"{args.verify} is valid: {found.samples} samples ({found.jpegs} JPEG, "
            f"{found.labelled} labelled), {found.payload_bytes / 1e6:.1f} MB, {checked}"
        )
    if args.input is None or args.output is None:
        raise ValueError("give --input and --output, or --verify")
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists; pass --overwrite to replace it")
    # Imports numba, which would slow down --help.
    from pipelines.conversion.convert import write_beton

    with contextlib.ExitStack() as stack:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        images, budget = open_input(args, stack)
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
            progress=lambda done, _: update_bar(bar, done),
        )
    restarts = made.restarts
    reencoded = ", ".join(f"{count} {why}" for why, count in made.reencoded.items()) or "none"
    return (
        f"{args.output}: {made.samples} samples, {len(made.classes)} classes, "
        f"{args.output.stat().st_size / 1e6:.1f} MB; {made.passed} unchanged, "
        f"re-encoded: {reencoded}; {made.quarantined} left out"
        + (f" ({args.output}.quarantine.jsonl)" if made.quarantined else "")
        + (
            ""
            if restarts is None
            else f"; {restarts.cut} with restart markers, {restarts.added} bytes added"
        )
    )


def open_input(args: Arguments, stack: contextlib.ExitStack) -> tuple[Images, int | None]:
    """Open the images; return them and the number that may be left out (None: the default).

    VOC2007 has several labels per image. They are written to NAME.labels.npy beside NAME.beton when
    the stack closes without an error. Its rows are in the order of images: none may be left out.

    Args:
        args: The command line, with input and output.
        stack: Closes the file of labels.

    Raises:
        ValueError: Options do not fit the input.
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


def update_bar(bar: tqdm, done: int) -> None:
    """Set the progress bar to `done` images; exit if SIGTERM has arrived."""
    leave_if_terminated()
    bar.update(done - bar.n)


if __name__ == "__main__":
    sys.exit(drive("to_beton", Arguments, main))
