"""End-to-end demo on real images: convert, pretrain, evaluate, print a summary. For `make demo`."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

BIN = Path(sys.executable).parent
SCRIPTS = Path(__file__).parent
RUNS, DATA = Path("runs/demo"), Path("data/digits")
LIMIT_SECONDS = 1200  # For one command, so that a hang ends.


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    began = time.monotonic()
    gpus = torch.cuda.device_count()
    # At most two: with more, the small recipe would have too few steps.
    processes = str(min(2, gpus or len(os.sched_getaffinity(0))))
    # torchrun sets the same value, but prints a warning of five lines.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    shutil.rmtree(RUNS, ignore_errors=True)

    step("Convert: scikit-learn's scanned digits to FFCV's beton format")
    for split in ("train", "val"):
        output = str(DATA / f"{split}.beton")
        options = ["--input", "digits", "--split", split, "--output", output, "--overwrite"]
        run([str(BIN / "python"), str(SCRIPTS / "to_beton.py"), *options])
        run([str(BIN / "python"), str(SCRIPTS / "to_beton.py"), "--verify", output])

    step(f"Pretrain: by which of four angles was this digit rotated? ({processes} processes)")
    pretrain = ["quickstart", "--run.out", str(RUNS / "pretrain")]
    run([*torchrun(processes), str(SCRIPTS / "pretrain.py"), *pretrain])

    step("Evaluate: linear classifiers on frozen features, 200 labels, trained and random weights")
    weights = {"trained": str(RUNS / "pretrain/backbone.safetensors"), "random": "random"}
    jobs = []
    for name, path in weights.items():
        out = RUNS / f"linear-{name}"
        out.mkdir(parents=True)
        options = ["quickstart_linear", "--weights", path, "--run.out", str(out)]
        with (out / "console.txt").open("w") as console:
            command = [*torchrun("1"), str(SCRIPTS / "evaluate.py"), *options]
            jobs.append((out, subprocess.Popen(command, stdout=console, stderr=console)))
    try:
        failed = [out for out, job in jobs if job.wait(timeout=LIMIT_SECONDS) != 0]
    finally:
        for _, job in jobs:
            job.kill()
    if failed:
        print((failed[0] / "console.txt").read_text(), file=sys.stderr)
        return 1
    report(time.monotonic() - began)
    return 0


def torchrun(processes: str) -> list[str]:
    return [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", processes]


def run(command: list[str]) -> None:
    status = subprocess.run(command, timeout=LIMIT_SECONDS, check=False).returncode
    if status != 0:
        sys.exit(status)


def rows(folder: str) -> dict[str, float]:
    results = json.loads((RUNS / folder / "results.json").read_text())
    return {row["metric"]: row["value"] for row in results}


def report(seconds: float) -> None:
    trained, random = rows("linear-trained"), rows("linear-random")
    rotation = rows("pretrain")["accuracy"]
    probes = [metric for metric in trained if metric.startswith("top1/")]
    line = "-" * 58
    print(f"\n{line}\n{'':30}{'RotNet':>12}{'control':>12}\n{line}")
    print(f"{'rotation accuracy (%)':30}{rotation:12.1f}{25.0:12.1f}  chance")
    for metric in probes:
        name = f"linear on {metric.removeprefix('top1/')} (%)"
        print(f"{name:30}{trained[metric]:12.1f}{random[metric]:12.1f}  random weights")
    print(f"{line}\n{seconds:.0f} s in total. Results:")
    print(f"  {RUNS / 'pretrain'}/            recipe, log, results, checkpoints, weights")
    print(f"  {RUNS / 'pretrain/figures'}/    views, curves, confusion, filters")
    print(f"  {BIN / 'tensorboard'} --logdir {RUNS}")


if __name__ == "__main__":
    sys.exit(main())
