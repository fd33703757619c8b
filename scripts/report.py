"""Render the results page from run folders: report.py RUNS... --output page.md|page.html"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from pipelines.checks import Checked, PositiveInt
from pipelines.storage import write_atomic
from rotpred.program import drive
from rotpred.report.build import TITLE, page
from rotpred.report.page import Block, html, markdown
from rotpred.report.results import FinishedRun, read_runs


@dataclass(frozen=True)
class Arguments(Checked):
    """Render the results page: every benchmark with trained, random and published weights.
    Benchmarks without a run are marked "not run"."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders of kept copies (NAME.results.json, NAME.env.json, ...)."""
    output: Path
    """The page: .md (links to figures) or .html (one file, figures embedded)."""
    notes: Path | None = None
    """A text file about these runs; its paragraphs go to the top of the page."""
    skip_broken: bool = False
    """Skip unfinished or damaged run folders with a message; by default they are an error."""
    gallery: str | None = None
    """Weights whose features are shown on images (.html only): a file, or "random"."""
    data: str | None = None
    """Images for --gallery: a .beton file or a folder."""
    backbone: str | None = None
    """Network of the --gallery weights; None if the file names it."""
    stage: str | None = None
    """Stage whose features are projected and compared; None for the last."""
    samples: PositiveInt = 500
    """Number of images drawn from --data."""


def main(args: Arguments) -> str:
    """Write the page and return a one-line summary. User errors raise `ValueError` or `OSError`."""
    if args.output.suffix not in (".md", ".html"):
        raise ValueError(f"{args.output}: the page must end in .md or .html")
    if (args.gallery is None) != (args.data is None):
        raise ValueError("--gallery and --data go together")
    if args.gallery is not None and args.output.suffix != ".html":
        raise ValueError("--gallery needs an .html page")
    runs: list[FinishedRun] = []
    left_out = []
    for path in args.runs:
        try:
            runs += read_runs(path)
        except (ValueError, OSError) as error:
            if not args.skip_broken:
                raise
            print(f"report: left out: {error}", file=sys.stderr)
            left_out.append(path.name)
    notes = [] if args.notes is None else args.notes.read_text().split("\n\n")
    notes = [" ".join(paragraph.split()) for paragraph in notes if paragraph.strip()]
    blocks: list[Block] = page(runs, left_out=left_out, notes=notes)
    if args.gallery is not None and args.data is not None:
        # Imports the loaders, which would slow down --help.
        from rotpred.report.gallery import feature_gallery

        blocks += feature_gallery(
            args.gallery, args.data, backbone=args.backbone, stage=args.stage, samples=args.samples
        )
    folder = args.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    if args.output.suffix == ".html":
        text = html(blocks, title=TITLE)
    else:
        text = markdown(blocks, folder=folder)
    write_atomic(args.output, text.encode())
    return f"{args.output}: {len(runs)} runs, {len(left_out)} left out, {len(text):,} characters"


if __name__ == "__main__":
    sys.exit(drive("report", Arguments, main))
