"""Run folder: read its logs and results, lock it, describe the environment."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import __version__
from pipelines.storage import locked, read_json
from rotpred.records.former_names import translate_names, translate_row

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def read_rows(path: Path) -> list[dict[str, object]]:
    """Return the rows of a log.jsonl, oldest first.

    A line that is not a JSON object (cut short by a crash) is skipped with a warning that gives its
    number.

    Raises:
        OSError: The file cannot be read.
    """
    rows: list[dict[str, object]] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(translate_row(row))
        elif line.strip():
            logger.warning("%s line %d is not a JSON object and is skipped", path, number)
    return rows


def row_step(row: Mapping[str, object]) -> int:
    """Return the step of a row of log.jsonl; 0 if it has none."""
    step = row.get("step", 0)
    return step if isinstance(step, int) else 0


def read_results(path: Path) -> list[dict[str, object]]:
    """Return the rows of a results.json; an empty list if the file is missing.

    Raises:
        ValueError: The file is not a JSON list of objects.
    """
    rows = read_json(path, list) if path.exists() else []
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a list of results; move or repair it")
    return [translate_row(row) for row in rows]


DONE = "done.json"
"""Name of the file that marks a run as finished, including results and figures."""


def what_counts(done: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of done.json that affect results: not where the cache lies, say."""
    fields: dict[str, object] = translate_names(done)
    if isinstance(recipe := fields.get("recipe"), dict):
        kept = {name: value for name, value in recipe.items() if name not in ("cache", "run")}
        # SVMs had no choice of `store` up to 0.2.
        fields["recipe"] = {"store": "float32", **kept, "precision": recipe["run"]["precision"]}
    return fields


@contextmanager
def lock(out: Path, recipe: str) -> Iterator[None]:
    """Lock the run folder for this job; create it if missing. Take it in the main process only.

    Args:
        out: The run folder.
        recipe: Name of the recipe that will write to it.

    Raises:
        ValueError: The folder is locked by another job or holds the run of another recipe. The
            message names it.
    """
    out.mkdir(parents=True, exist_ok=True)
    hint = (
        "two jobs in one run folder overwrite each other's checkpoints. Choose another folder or "
        "stop that job first"
    )
    with locked(out, hint=hint):
        kept = out / "recipe.json"
        if kept.exists():
            name = read_json(kept, dict).get("name")
            if name not in (None, recipe):
                raise ValueError(
                    f"{out} holds a run of {name}: choose another folder for {recipe} with "
                    "--run.out"
                )
        yield


def environment(device: torch.device, *, world: int) -> dict[str, object]:
    """Return what results depend on besides the recipe: versions, hardware, command, git state.

    Imports no package to find its version.
    """
    import torch

    versions: dict[str, str | None] = dict.fromkeys(("torch", "torchvision", "numpy", "ffcv"))
    versions["dali"] = None
    for package in distributions():
        name = package.name.lower()
        if name in versions:
            versions[name] = package.version
        elif name.startswith("nvidia-dali-cuda"):
            versions["dali"] = f"{package.version} ({name})"
    # Cores that this process may use: a container or taskset may allow fewer than there are.
    cores = sorted(os.sched_getaffinity(0))
    return {
        "rotpred": __version__,
        "python": platform.python_version(),
        **versions,
        "cuda": torch.version.cuda,
        # What fp32 means on a GPU: by default torch rounds the inputs of convolutions to 10 bits.
        "tf32": {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "products": torch.backends.cuda.matmul.allow_tf32,
        },
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": len(cores),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "world": world,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": git_state(Path(__file__).parent),
    }


def cpu_model() -> str:
    """Return the CPU model name from /proc/cpuinfo, or what `platform` knows."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state(folder: Path) -> dict[str, object] | None:
    """Return revision and dirty flag of a checkout; None outside of one or without git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    if revision is None:
        return None
    return {"revision": revision, "dirty": bool(git("status", "--porcelain", "-uno"))}


def rss_mib() -> float:
    """Return the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
