"""Start-up: what help, error messages and the start of a run must not import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.processes import ROOT

HEAVY = (
    "cv2", "ffcv", "matplotlib", "numba", "nvidia.dali", "pycocotools", "scipy", "sklearn",
    "tensorboard", "torch", "torchvision",
)  # fmt: skip
NOT_TO_START = ("matplotlib", "nvidia.dali", "pycocotools", "sklearn", "tensorboard")
"""What a run imports when it needs it, if at all."""

COMMANDS = {
    "pretrain.py": 0,
    "pretrain.py --help": 0,
    "pretrain.py no_such_recipe": 2,
    "pretrain.py quickstart --help": 0,
    "pretrain.py quickstart --no-such-option 1": 2,
    "pretrain.py quickstart --run.epochs 0": 2,
    "evaluate.py --help": 0,
    "evaluate.py in1k_linear --help": 0,
    "evaluate.py coco_det --help": 0,
    "evaluate.py cityscapes_seg --help": 0,
    "evaluate.py voc07_svm --help": 0,
    "to_beton.py --help": 0,
    "to_beton.py --input x": 2,
    "export.py --help": 0,
    "export.py x.pt --format no_such_format --output y.pth": 2,
    "report.py --help": 0,
}
"""Commands by their exit status. None of them may import any of `HEAVY`."""

PROTOCOLS = ("pretrain", "linear", "knn", "svm", "rotation")
"""Protocols whose modules may import torch, but none of `NOT_TO_START`."""

PROGRAM = """
import contextlib, importlib, io, json, os, runpy, sys
commands, heavy, protocols, light = json.loads(sys.argv[1])
found = {}
for command in commands:
    sys.argv = [f"scripts/{command.split()[0]}", *command.split()[1:]]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
    found[command] = status, [name for name in heavy if name in sys.modules]
for name in protocols:
    importlib.import_module(f"rotpred.protocols.{name}")
    found[name] = 0, [module for module in light if module in sys.modules]
print(json.dumps(found))
"""


@pytest.mark.timeout(60)
def test_heavy_modules_are_imported_late() -> None:
    """One process for all: the first command that imports a module is the one to look at."""
    table = json.dumps([list(COMMANDS), HEAVY, PROTOCOLS, NOT_TO_START])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, table],
        cwd=ROOT, capture_output=True, text=True, timeout=50, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found == {
        **{command: [status, []] for command, status in COMMANDS.items()},
        **{name: [0, []] for name in PROTOCOLS},
    }
