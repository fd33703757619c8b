"""All CPU benchmarks one after the other, and a table of the ratios against their targets.

    python benchmarks/run_all.py [--data FOLDER] [--output benchmarks/results/local]

Rows and figures of each program go into the output folder. With the default lengths it takes less
than ten minutes on two cores; leave the machine alone meanwhile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rows import say, table

HERE = Path(__file__).parent
LIMIT_SECONDS = 900
"""For one program: a hang must not outlive the patience of whoever typed the command."""


@dataclass(frozen=True)
class Arguments:
    """Run all CPU benchmarks."""

    data: str | None = None
    """A folder of JPEG files; without it, 200 photographs are made."""
    output: Path = HERE / "results" / "local"
    """Folder for rows (JSON lines) and figures (PNG)."""
    repeats: int = 5
    """Windows of each contestant."""
    seconds: float = 2.0
    """Length of a window, at least."""
    only: tuple[str, ...] = ()
    """Programs to run, by name; all by default."""


def programs(args: Arguments) -> dict[str, list[str]]:
    """The programs and their arguments; all run on the CPU."""
    pictures = args.output / "pictures"
    data = ["--data", args.data] if args.data else []
    timing = ["--repeats", str(args.repeats), "--seconds", str(args.seconds)]
    cpu = ["--device", "cpu"]
    return {
        # First: it leaves the containers in which the next ones find the same pictures.
        "peers": [*data, "--folder", str(pictures), *timing],
        "loaders": [*_found(pictures), *timing, *cpu],
        "rotate4": [*timing, *cpu],
        "train_step": ["--backbone", "resnet18_tiny", "--size", "32", *timing, *cpu],
        "end_to_end": [*_small(pictures), "--backbone", "resnet18_tiny", *timing, *cpu],
        "convert": [*data, *timing],
        "scale": ["--samples", "1000", "100000", "1300000", "--repeats", "3"],
        "doctor": [*_small(pictures), "--backbone", "resnet18_tiny", *cpu],
    }


def _found(pictures: Path) -> list[str]:
    """The containers that `peers` has made, without the one that FFCV wrote."""
    folders = sorted(p for p in pictures.glob("*/small*") if p.is_dir())
    betons = sorted(p for p in pictures.glob("*/small*.beton"))
    return [str(p) for p in (*folders, *betons)]


def _small(pictures: Path) -> list[str]:
    spliced = sorted(pictures.glob("*/small*-markers.beton"))
    return ["--data", str(spliced[0])] if spliced else []


def main(args: Arguments) -> int:
    """Run them; returns 1 where one failed."""
    args.output.mkdir(parents=True, exist_ok=True)
    unknown = sorted(set(args.only) - programs(args).keys())
    if unknown:
        say(f"run_all: --only: no program {unknown[0]!r}")
        return 2
    begin = time.monotonic()
    failed = []
    for name in args.only or programs(args):
        output, plot = args.output / f"{name}.jsonl", args.output / f"{name}.png"
        say(f"\n== {name}")
        command = [str(HERE / f"{name}.py"), *programs(args)[name]]
        command += ["--output", str(output), "--plot", str(plot)]
        done = subprocess.run([sys.executable, *command], timeout=LIMIT_SECONDS, check=False)
        if done.returncode != 0:
            output.unlink(missing_ok=True)  # An older run's rows must not pass for this one's.
            failed.append(name)
    rows = [
        json.loads(line)
        for path in sorted(args.output.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    say(
        f"\n== Against the targets ({time.monotonic() - begin:.0f} s in all, rows in {args.output})"
    )
    say(table([r for r in rows if r.get("target") is not None], ("target", "met")))
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Arguments)))
    except (OSError, subprocess.TimeoutExpired) as problem:
        print(f"run_all: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
