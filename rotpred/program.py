"""Entry points of the programs in scripts/: arguments, signals, one-line errors, exit status."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rotpred.records.console import configure_logging

A = TypeVar("A")

USER_ERROR = 2
"""Exit status when the user must change the command, the data or the machine."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""

TERMINATED = 143
"""Exit status after SIGTERM, as in shells."""

_terminated: list[bool] = []


def drive(name: str, arguments: type[A], main: Callable[[A], str]) -> int:
    """Read a command line, run `main` and print the text that it returns.

    Args:
        name: Of the program; printed before the text of an error.
        arguments: A dataclass that tyro builds from the command line. tyro exits on a mistake.
        main: Returns the lines to print. `ValueError`, `OSError` and `ImportError` become one line
            for the user; other exceptions show a traceback.

    Returns:
        The exit status. SIGTERM raises `SystemExit`, so that temporary files are removed.
    """
    import tyro

    _terminated.clear()
    signal.signal(signal.SIGTERM, _terminate)
    configure_logging()
    try:
        print(main(tyro.cli(arguments)))
    except (ValueError, OSError, ImportError) as problem:
        print(f"{name}: {' '.join(str(problem).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _terminate(*_: object) -> None:
    _terminated.append(True)
    sys.exit(TERMINATED)


def leave_if_terminated() -> None:
    """Exit if SIGTERM has arrived; long work calls this between its parts.

    Python drops an exception that a signal handler raises in some places, such as a fork callback.
    The work would continue.
    """
    if _terminated:
        sys.exit(TERMINATED)


def report_error(text: str, *, summary: str = "") -> None:
    """Print an error to stderr, once per machine, and pass it to torchrun.

    If the data are missing, say, every process of a job fails with the same error. The first one on
    a machine prints it. torchrun sets TORCHELASTIC_ERROR_FILE: the text in that file appears in its
    summary, in place of the advice to record tracebacks.

    Args:
        text: To print. One line, or a message of tyro.
        summary: One line for torchrun; empty for `text`.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        print(text, file=sys.stderr)
        return
    summary = summary or text
    folder = Path(file).parents[1]  # of this attempt; each local rank has a folder in it
    if not _printed_by_another(text, folder):
        print(text, file=sys.stderr, flush=True)
    # After the line: torchrun may end this process as soon as another one has failed.
    note = {"py_callstack": summary, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(file).write_text(json.dumps({"message": {"message": summary, "extraInfo": note}}))


def _printed_by_another(text: str, folder: Path) -> bool:
    marker = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.printed"
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:
        return False  # a full disk, say, which may be what the text is about
    return False
