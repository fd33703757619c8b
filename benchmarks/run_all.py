"""All CPU benchmarks one after the other, and a table of the ratios against their targets.

    python benchmarks/run_all.py [--data FOLDER] [--output benchmarks/results/local]

Rows and figures of each program go into the output folder. With the default lengths it takes less
than ten minutes on two cores; leave the machine alone meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from data.photographs import PHOTOGRAPHS, Containers, containers
from harness.results import say, table

HERE = Path(__file__).parent
LIMIT_SECONDS = 900
"""For one program: a hang must not outlive the patience of whoever typed the command."""


@dataclass(frozen=True)
class Arguments:
    """Run all CPU benchmarks."""

    data: str | None = None
    """A folder of JPEG files; without it, photographs are made."""
    output: Path = HERE / "results" / "local"
    """Folder for rows (JSON lines) and figures (PNG)."""
    repeats: int = 5
    """Windows of each contestant."""
    seconds: float = 0.5
    """Length of a window, at least."""
    only: tuple[str, ...] = ()
    """Programs to run, by name; all by default."""


def programs(args: Arguments, made: Containers) -> dict[str, list[str]]:
    """The programs and their arguments; all run on the CPU."""
    folder = ["--folder", str(args.output / "images"), "--batch-size", "32"]
    timing = ["--repeats", str(args.repeats), "--seconds", str(args.seconds)]
    cpu = ["--device", "cpu"]
    # A network so small that loading matters, too.
    small = ["--backbone", "resnet18_tiny", "--size", "64", *cpu]
    spliced = ["--data", str(made.small(markers=True))]
    given = ["--data", args.data] if args.data else []
    return {
        "peers": [*given, *folder, *timing],
        # One container of the six that it compares by itself: each takes a minute and a half.
        "loaders": [str(made.small(markers=True)), *timing, *cpu, "--batch-size", "32"],
        "resize": [*spliced, *timing],
        "rotate4": [*timing, *cpu],
        "train_step": ["--backbone", "resnet18_tiny", "--size", "32", *timing, *cpu],
        "end_to_end": [*spliced, *small, *timing],
        "convert": ["--data", str(made.small_folder()), *timing],
        "splice": [*spliced, "--images", "200", "--crops", "2", "--repeats", str(args.repeats)],
        "scale": ["--samples", "1000", "100000", "1300000", "14000000", "--repeats", "3"],
        "doctor": [*spliced, *small],
        # Of the four recipes the one whose step is quickest on a CPU.
        "dense": ["--recipes", "voc12aug_seg", "--count", "16", *timing, *cpu],
    }


def main(args: Arguments) -> int:
    """Run them; returns 1 where one failed."""
    begin = time.monotonic()
    made = containers(args.data, args.output / "images", count=PHOTOGRAPHS)
    chosen = programs(args, made)
    unknown = sorted(set(args.only) - chosen.keys())
    if unknown:
        raise ValueError(f"--only: no program {unknown[0]!r}; there are: {', '.join(chosen)}")
    failed, rows = [], []
    for name in args.only or chosen:
        output = args.output / f"{name}.jsonl"
        # An older run's rows must not pass for this one's.
        output.unlink(missing_ok=True)
        say(f"\n== {name}")
        trouble = _run(name, [*chosen[name], "--output", str(output)], args.output)
        if trouble:
            failed.append(f"{name} ({trouble})")
        else:
            rows += [json.loads(line) for line in output.read_text().splitlines()]
    say(
        f"\n== Against the targets ({time.monotonic() - begin:.0f} s in all, rows in {args.output})"
    )
    say(table([r for r in rows if r.get("target") is not None], ("target", "met")))
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _run(name: str, arguments: list[str], folder: Path) -> str:
    """Run one program; what went wrong with it, or nothing."""
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
    command += ["--plot", str(folder / f"{name}.png")]
    # A session of its own: the processes that it started have to end with it.
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            status = process.wait(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"not done after {LIMIT_SECONDS} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return f"exit status {status}" if status else ""


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Arguments)))
    except (ValueError, OSError) as problem:
        print(f"run_all: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
