"""Runs all CPU benchmarks in sequence and prints all results that have a target.

    python benchmarks/run_all.py [--data FOLDER] [--output benchmarks/results/local]

Each program's rows and figures go into the output folder. With the default window lengths this
takes less than ten minutes on two cores; run nothing else meanwhile.
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

from data.photographs import PHOTOGRAPHS, Containers, containers
from harness.results import log, run_program, table

HERE = Path(__file__).parent
LIMIT_SECONDS = 900
"""For one program, so that a hang ends."""


@dataclass(frozen=True)
class Arguments:
    """Run all CPU benchmarks."""

    data: str | None = None
    """A folder of JPEG files; by default photographs are generated."""
    output: Path = HERE / "results" / "local"
    """Folder for rows (JSON lines) and figures (PNG)."""
    repeats: int = 5
    """Windows of each contestant."""
    seconds: float = 0.5
    """Minimum length of a window."""
    only: tuple[str, ...] = ()
    """Programs to run; by default all."""


def programs(args: Arguments, made: Containers) -> dict[str, list[str]]:
    """Return the programs and their arguments; all run on the CPU."""
    folder = ["--folder", str(args.output / "images"), "--batch-size", "32"]
    timing = ["--repeats", str(args.repeats), "--seconds", str(args.seconds)]
    cpu = ["--device", "cpu"]
    # A network so small that loading also matters.
    small = ["--backbone", "resnet18_tiny", "--size", "64", *cpu]
    spliced = ["--data", str(made.small(markers=True))]
    given = ["--data", args.data] if args.data else []
    return {
        "peers": [*given, *folder, *timing],
        # One container; by default it compares six, at a minute and a half each.
        "loaders": [str(made.small(markers=True)), *timing, *cpu, "--batch-size", "32"],
        "resize": [*spliced, *timing],
        "rotate4": [*timing, *cpu],
        "train_step": ["--backbone", "resnet18_tiny", "--size", "32", *timing, *cpu],
        "end_to_end": [*spliced, *small, *timing],
        "convert": ["--data", str(made.small_folder()), *timing],
        "splice": [*spliced, "--images", "200", "--crops", "2", "--repeats", str(args.repeats)],
        "scale": ["--samples", "1000", "100000", "1300000", "14000000", "--repeats", "3"],
        "doctor": [*spliced, *small],
        # Of the four recipes, the one with the fastest step on a CPU.
        "dense": ["--recipes", "voc12aug_seg", "--count", "16", *timing, *cpu],
    }


def main(args: Arguments) -> int:
    """Run the programs; returns the exit status, 1 if one failed."""
    begin = time.monotonic()
    made = containers(args.data, args.output / "images", count=PHOTOGRAPHS)
    chosen = programs(args, made)
    unknown = sorted(set(args.only) - chosen.keys())
    if unknown:
        raise ValueError(f"--only: unknown program {unknown[0]!r}; known: {', '.join(chosen)}")
    failed, rows = [], []
    for name in args.only or chosen:
        output = args.output / f"{name}.jsonl"
        # Rows of an older run must not be taken for this run's.
        output.unlink(missing_ok=True)
        log(f"\n== {name}")
        problem = _run(name, [*chosen[name], "--output", str(output)], args.output)
        if problem:
            failed.append(f"{name} ({problem})")
        else:
            rows += [json.loads(line) for line in output.read_text().splitlines()]
    log(
        f"\n== Against the targets ({time.monotonic() - begin:.0f} s in all, rows in {args.output})"
    )
    log(table([r for r in rows if r.get("target") is not None], ("target", "met")))
    if failed:
        log(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _run(name: str, arguments: list[str], folder: Path) -> str:
    """Run one program and return the reason of a failure, or an empty string."""
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
    command += ["--plot", str(folder / f"{name}.png")]
    # A new session, so that the program's child processes can be killed with it.
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            status = process.wait(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"timed out after {LIMIT_SECONDS} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return f"exit status {status}" if status else ""


if __name__ == "__main__":
    run_program(main, Arguments, "run_all")
