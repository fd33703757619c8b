"""How a program of scripts/ starts and ends: arguments, signals, one-line errors, exit status."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from rotpred.records.console import configure_logging

A = TypeVar("A")

USER_ERROR = 2
"""Exit status where the command, the data or the machine must change."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

TERMINATED = 143
"""Exit status after SIGTERM, as shells have it."""

_terminated: list[bool] = []


def drive(name: str, arguments: type[A], main: Callable[[A], str]) -> int:
    """Read a command line, do what it says and print what came of it.

    Args:
        name: of the program, before the text of an error.
        arguments: a dataclass, which tyro makes from the command line; exits where it cannot.
        main: returns the lines to print; `ValueError`, `OSError` and `ImportError` are for the
            person at the keyboard and become one line, others a traceback.

    Returns:
        The exit status. SIGTERM leaves by `SystemExit`, so that temporary files go.
    """
    _terminated.clear()
    signal.signal(signal.SIGTERM, _terminate)
    configure_logging()
    try:
        print(main(tyro.cli(arguments)))  # noqa: T201
    except (ValueError, OSError, ImportError) as problem:
        print(f"{name}: {' '.join(str(problem).split())}", file=sys.stderr)  # noqa: T201
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _terminate(*_: object) -> None:
    _terminated.append(True)
    sys.exit(TERMINATED)


def leave_if_terminated() -> None:
    """For the progress of long work: Python drops an exception that a signal's handler raises in
    some places (in a callback of fork, say), and the work would go on."""
    if _terminated:
        sys.exit(TERMINATED)
