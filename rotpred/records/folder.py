"""Files of a run folder: written so that a reader never sees half of one, read back, locked."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path

import torch

from rotpred.records.former_names import translated_row

logger = logging.getLogger(__name__)


def read_rows(path: Path) -> list[dict[str, object]]:
    """The rows of a log.jsonl, oldest first.

    A line that is no JSON object (a machine that went down left half of one) is skipped with a
    warning that names it.
    """
    rows: list[dict[str, object]] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(translated_row(row))
        elif line.strip():
            logger.warning("%s line %d is not a JSON object and is skipped", path, number)
    return rows


def row_step(row: Mapping[str, object]) -> int:
    """The step of a row of log.jsonl; 0 for a row that has none."""
    step = row.get("step", 0)
    return step if isinstance(step, int) else 0


def read_results(path: Path) -> list[dict[str, object]]:
    """The rows of a results.json; none where the file is missing.

    Raises:
        ValueError: the file is not a JSON list of objects.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); move it away or mend it") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a list of results; move it away or mend it")
    return [translated_row(row) for row in rows]


DONE = "done.json"
"""Name of the file that marks a run folder as finished, results and figures included."""


@contextmanager
def lock(out: Path, recipe: str = "") -> Iterator[None]:
    """Hold the run folder for this job alone; make it where missing.

    The lock is the kernel's (`flock` on out/.lock) and ends with the process, however that ends:
    nothing is left to clean up. Take it in the main process only.

    Args:
        out: the folder.
        recipe: name of the recipe that will fill it; empty for any.

    Raises:
        ValueError: another job holds it, or it holds the run of another recipe; the message says
            which.
    """
    out.mkdir(parents=True, exist_ok=True)
    # Unbuffered: on a full disk, closing the file must not try to write once more.
    with (out / ".lock").open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                holder = file.read().decode().strip() or "another process"
                raise ValueError(
                    f"{out} is in use by {holder}: two jobs in one run folder overwrite each "
                    f"other's checkpoints. Choose another folder, or stop that job first"
                ) from None
            # Some network file systems cannot lock. That is no reason not to train.
            logger.warning("cannot lock %s (%s); make sure that no other job uses it", out, error)
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            logger.warning("cannot write %s/.lock (%s)", out, error)
        if recipe:
            _refuse_another(out, recipe)
        yield


def _refuse_another(out: Path, recipe: str) -> None:
    kept = out / "recipe.json"
    if not kept.exists():
        return
    try:
        held = json.loads(kept.read_bytes())
    except ValueError as error:
        raise ValueError(f"{kept} is not JSON ({error}); move it away or mend it") from error
    name = held.get("name") if isinstance(held, dict) else None
    if name not in (None, recipe):
        raise ValueError(
            f"{out} is the folder of a run of {name}: {recipe} needs one of its own, --run.out"
        )


def environment(device: torch.device, *, world: int) -> dict[str, object]:
    """What the numbers of a run depend on besides its recipe. Imports nothing to find out."""
    versions: dict[str, str | None] = dict.fromkeys(("torch", "torchvision", "numpy", "ffcv"))
    versions["dali"] = None
    for package in distributions():
        name = package.name.lower()
        if name in versions:
            versions[name] = package.version
        elif name.startswith("nvidia-dali-cuda"):
            versions["dali"] = f"{package.version} ({name})"
    # As opposed to the cores of the machine: a container or taskset may allow fewer.
    cores = sorted(os.sched_getaffinity(0))
    return {
        "python": platform.python_version(),
        **versions,
        "cuda": torch.version.cuda,
        # What fp32 means on a GPU: torch rounds the factors of convolutions to 10 bits, by default.
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
    """The processor's name, as the kernel tells it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state(folder: Path) -> dict[str, object] | None:
    """Revision, and whether files differ from it; None outside a checkout or without git."""

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
    """Memory of this process that is in RAM, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
