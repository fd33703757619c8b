"""The process of one contestant: reads a configuration and then commands, one JSON line each.

Started by `harness.runner.Contestant`, not by hand. An answer is one JSON line: `result`, or `error`. The
method `ready` is answered with nothing, once everything is imported.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback

KINDS = {
    "ours": ("contestants.ours", "Ours"),
    "pil": ("contestants.peers", "PilLoader"),
    "tensor": ("contestants.peers", "TensorLoader"),
    "mmselfsup": ("contestants.peers", "MmselfsupWay"),
    "ffcv": ("contestants.peers", "StockFfcv"),
    "dali": ("contestants.peers", "StockDali"),
    "our writer": ("contestants.writers", "OurWriter"),
    "stock writer": ("contestants.writers", "StockWriter"),
    "opened": ("contestants.opened_beton", "OpenedBeton"),
    "step": ("harness.training_step", "StepPlayer"),
}
"""Module and class. Only what plays is imported: memory is measured, and imports take seconds."""


def main() -> None:
    """Serve until the other side closes the pipe."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    config = json.loads(sys.stdin.readline())
    threads = config.pop("torch_threads", 1)
    failure = ""
    player = None
    try:
        module, kind = KINDS[config.pop("kind")]
        make = getattr(importlib.import_module(module), kind)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        player = make(**config)
    except Exception as error:  # told to the other side with the first answer
        traceback.print_exc()
        failure = _one_line(error)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if failure:
                raise ValueError(failure)
            method = command["method"]
            # Imports are done: what any player can say of itself.
            ready = method == "ready"
            answer = {"result": {} if ready else getattr(player, method)(**command["arguments"])}
        except Exception as error:  # the other side raises it
            traceback.print_exc()
            answer = {"error": _one_line(error)}
        answers.write(json.dumps(answer) + "\n")
    if player is not None:
        player.close()


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Threads of a stock loader that was left early would keep the process alive.
    os._exit(0)
