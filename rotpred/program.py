"""Entry points of the programs in scripts/: arguments, signals, one-line errors, exit status."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
import traceback
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
        main: Returns the lines to print.

    Returns:
        The exit status; see `exit_status`. SIGTERM raises `SystemExit`, so that temporary files are
        removed.
    """
    import tyro

    _terminated.clear()
    signal.signal(signal.SIGTERM, _terminate)
    configure_logging()
    return exit_status(name, lambda: print(main(tyro.cli(arguments))))


def exit_status(name: str, main: Callable[[], int | None]) -> int:
    """Run `main` and return the exit status: its own, or that of an error or of Ctrl-C.

    `ValueError`, `OSError` and `ImportError` are about what the user can change: arguments, data, a
    full disk, a missing package. They become one line. Others are our mistakes: they are raised,
    and torchrun's summary shows their traceback. With ROTPRED_DEBUG in the environment, so are all.

    Args:
        name: Printed before the text of an error.
        main: Returns the exit status; None for 0.
    """
    try:
        return main() or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        users = isinstance(error, (ValueError, OSError, ImportError))
        if users and not os.environ.get("ROTPRED_DEBUG"):
            text = " ".join(str(error).split())
            report_error(f"{name}: {text} (ROTPRED_DEBUG=1 shows where)")
            return USER_ERROR
        _tell_torchrun(f"{type(error).__name__}: {error}", traceback.format_exc())
        raise


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
    a machine prints it.

    Args:
        text: To print. One line, or a message of tyro.
        summary: One line for torchrun; empty for `text`.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    # Of this attempt; each local rank has a folder in it.
    if file is None or not _printed_by_another(text, Path(file).parents[1]):
        print(text, file=sys.stderr, flush=True)
    # After the line: torchrun may end this process as soon as another one has failed.
    _tell_torchrun(summary or text, summary or text)


def _tell_torchrun(message: str, trace: str) -> None:
    """Write the file that torchrun asks for: `trace` appears in its summary.

    As `torch.distributed.elastic`'s `record` does, whose import takes a second.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None:
        note = {"py_callstack": trace, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": note}}))


def _printed_by_another(text: str, folder: Path) -> bool:
    marker = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.printed"
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:
        return False  # a full disk, say, which may be what the text is about
    return False
