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
from pipelines.checks import Checked, NonNegativeInt
from pipelines.conversion.inputs import open_input
from pipelines.storage import locked, replaced
from rotpred.program import drive, leave_if_terminated


@dataclass(frozen=True)
class Arguments(Checked):
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
    workers: NonNegativeInt = 0
    """Worker processes; 0: one per allowed core."""
    unlabelled: bool = False
    """Drop labels; take images at any depth of a folder."""
    split: Literal["train", "val"] = "train"
    """Split of torchvision:NAME or digits; not for folders and lists."""
    budget: NonNegativeInt | None = None
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

    args.output.parent.mkdir(parents=True, exist_ok=True)
    given = open_input(
        args.input,
        root=args.root,
        labelled=not args.unlabelled,
        split=args.split,
        budget=args.budget,
    )
    with contextlib.ExitStack() as stack:
        if given.labels is not None:  # renamed to its place once the beton is complete
            place = args.output.with_suffix(".labels.npy")
            stack.enter_context(locked(place, hint="two conversions cannot write one file"))
            labels = stack.enter_context(replaced(place))
            with labels.open("wb") as file:
                np.save(file, given.labels)
        bar = stack.enter_context(
            tqdm(total=len(given.images), unit="img", smoothing=0.1, disable=None)
        )

        def progress(done: int, _total: int) -> None:
            leave_if_terminated()
            bar.update(done - bar.n)

        made = write_beton(
            given.images,
            args.output,
            max_side=args.max_side,
            short_side=args.short_side,
            quality=args.quality,
            workers=args.workers,
            budget=given.budget,
            check=args.check,
            restart_markers=args.restart_markers,
            overwrite=args.overwrite,
            progress=progress,
        )
    reencoded = ", ".join(f"{count} {why}" for why, count in made.reencoded.items()) or "none"
    left_out = f" ({args.output}.quarantine.jsonl)" if made.quarantined else ""
    cut = made.restarts
    return (
        f"{args.output}: {made.samples} samples, {len(made.classes)} classes, "
        f"{args.output.stat().st_size / 1e6:.1f} MB; {made.passed} unchanged, "
        f"re-encoded: {reencoded}; {made.quarantined} left out{left_out}"
        + (f"; {cut.cut} with restart markers, {cut.added} bytes added" if cut else "")
    )


if __name__ == "__main__":
    sys.exit(drive("to_beton", Arguments, main))
