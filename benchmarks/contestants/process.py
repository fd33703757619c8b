"""Main program of a contestant's process: reads a configuration, then commands, as JSON lines.

`harness.runner.ContestantProcess` starts it. Each answer is one JSON line with `result` or `error`.
The method `ready` returns an empty result once everything is imported.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback

KINDS = {
    "ours": ("contestants.ours", "OurLoader"),
    "pil": ("contestants.peers", "PilLoader"),
    "tensor": ("contestants.peers", "TensorLoader"),
    "mmselfsup": ("contestants.peers", "MmselfsupLoader"),
    "ffcv": ("contestants.peers", "StockFfcv"),
    "dali": ("contestants.peers", "StockDali"),
    "our writer": ("contestants.writers", "OurWriter"),
    "stock writer": ("contestants.writers", "StockWriter"),
    "opened": ("contestants.opened_beton", "OpenedBeton"),
    "step": ("contestants.training_step", "StepContestant"),
}
"""Module and class by kind. Only the chosen one is imported: memory is measured, and imports take
seconds."""


def main() -> None:
    """Answer commands until the parent closes the pipe."""
    # Libraries print to stdout; that must not mix with the answers, so it goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    config = json.loads(sys.stdin.readline())
    threads = config.pop("torch_threads", 1)
    failure = ""
    contestant = None
    try:
        module, kind = KINDS[config.pop("kind")]
        make = getattr(importlib.import_module(module), kind)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        contestant = make(**config)
    except Exception as error:  # The first answer reports it to the parent.
        traceback.print_exc()
        failure = _one_line(error)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if failure:
                raise ValueError(failure)
            method = command["method"]
            # Imports are done, and every contestant can say so.
            ready = method == "ready"
            answer = {
                "result": {} if ready else getattr(contestant, method)(**command["arguments"])
            }
        except Exception as error:  # The parent raises it.
            traceback.print_exc()
            answer = {"error": _one_line(error)}
        answers.write(json.dumps(answer) + "\n")
    if contestant is not None:
        contestant.close()


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Threads of a stock loader whose epoch was abandoned would keep the process alive.
    os._exit(0)
