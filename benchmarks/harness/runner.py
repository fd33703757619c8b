"""Runs every contestant in its own process and alternates their timed windows (ABBA).

Contestants in one process would disturb one another: importing FFCV changes torch's threads, DALI
keeps pools, forked workers copy their parent's memory. So each has its own process, takes commands
over a pipe, and idles while others run.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from harness.timing import Window, abba

FOLDER = Path(__file__).resolve().parents[1]
"""The folder that `contestants`, `data` and `harness` are imported from."""
ANSWER_TIMEOUT_SECONDS = 300.0
"""For one answer, in addition to the window's length: FFCV compiles for about a minute."""


def module_command(module: str) -> list[str]:
    """Return the command of a module of the benchmarks.

    -P: the current directory may hold a `data` or `harness` of its own.
    """
    return [sys.executable, "-P", "-m", module]


def module_environment() -> dict[str, str]:
    """Return an environment in which the packages of the benchmarks are found first."""
    paths = (str(FOLDER), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


class ContestantError(ValueError):
    """A contestant failed, exited or did not answer; the message is one line."""


class ContestantProcess:
    """Handle of a contestant's process."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        """Start `contestants.process`.

        Args:
            name: Name for error messages.
            config: `kind` (a key of `contestants.process.KINDS`) and the arguments of its class.
        """
        self.name = name
        self._stderr = tempfile.TemporaryFile()
        self._unread = b""
        self._process = subprocess.Popen(
            module_command("contestants.process"),
            env=module_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        self._write(dict(config))

    @property
    def _stdout(self) -> Any:
        return self._process.stdout

    def call(
        self, method: str, *, timeout: float = ANSWER_TIMEOUT_SECONDS, **arguments: Any
    ) -> Any:
        """Call a method of the contestant and return its result.

        Args:
            method: Name of the method.
            timeout: Seconds to wait for the answer.
            arguments: Keyword arguments of the method.

        Raises:
            ContestantError: The contestant raised, exited, or did not answer in time.
        """
        self.send(method, **arguments)
        return self.receive(method, timeout=timeout)

    def send(self, method: str, **arguments: Any) -> None:
        """Start a call without waiting, so that several contestants can work at once.

        Raises:
            ContestantError: The contestant has exited.
        """
        self._write({"method": method, "arguments": arguments})

    def receive(self, method: str, *, timeout: float = ANSWER_TIMEOUT_SECONDS) -> Any:
        """Return the answer to the oldest unanswered `send`; raises as `call` does."""
        answer = json.loads(self._read_line(method, timeout))
        if "error" in answer:
            raise ContestantError(f"{self.name}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Close the pipe; kill the process if it has not exited after 20 s."""
        self._selector.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()
        self._stderr.close()

    def __enter__(self) -> ContestantProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._process.kill()
        self.close()

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(message) + "\n").encode())
        except BrokenPipeError:
            raise ContestantError(f"{self.name} exited: {self._exit_reason()}") from None

    def _read_line(self, method: str, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._unread:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise ContestantError(f"{self.name}: no answer to {method} for {timeout:.0f} s")
            chunk = os.read(self._stdout.fileno(), 1 << 16)
            if not chunk:
                raise ContestantError(f"{self.name} exited: {self._exit_reason()}")
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _exit_reason(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        if lines:
            return lines[-1]
        try:
            return f"exit status {self._process.wait(timeout=20)}"
        except subprocess.TimeoutExpired:
            return "it closed its pipe without an error message and is still running"


def run_alternating(
    configs: Mapping[str, Mapping[str, Any]],
    *,
    repeats: int,
    seconds: float,
    calls: Sequence[str] = (),
    parallel_calls: Sequence[str] = (),
    title: str = "",
    alone: bool = False,
) -> tuple[dict[str, list[Window]], dict[str, dict[str, Any]]]:
    """Run the contestants' windows in ABBA order.

    Args:
        configs: Configurations by name; see `contestants.process.KINDS`.
        repeats: Windows per contestant.
        seconds: Length of a window.
        calls: Methods called on one contestant after another, between the first batch and the
            windows. Each returns a dictionary of fields. `memory` is called after the windows.
        parallel_calls: Further methods that time nothing: all contestants run them at once.
        title: Title of the progress bar and prefix of the progress lines on stderr.
        alone: Run one contestant at a time, because they would not fit into memory together. Half
            of the windows are taken forwards through the names, the others backwards.

    Returns:
        The windows by name, and the fields by name: `first_batch_seconds` and the calls' results.

    Raises:
        ContestantError: A contestant raised, exited, or did not answer in time.
    """
    windows: dict[str, list[Window]] = {name: [] for name in configs}
    facts: dict[str, dict[str, Any]] = {}
    bar = tqdm(total=repeats * len(configs), desc=title, unit="window", leave=False, disable=None)
    begin = time.monotonic()

    def phase(text: str) -> None:
        # A line, because a log has no bar.
        bar.write(f"{title}: {time.monotonic() - begin:.0f} s: {text}", file=sys.stderr)

    def timed_window(name: str, process: ContestantProcess) -> None:
        values = process.call("window", seconds=seconds, timeout=ANSWER_TIMEOUT_SECONDS + seconds)
        windows[name].append(Window(*values))
        bar.update()

    def first_batch(name: str, process: ContestantProcess) -> None:
        phase(f"{name}: first batch")
        facts[name] = process.call("first_batch")
        for method in calls:
            phase(f"{name}: {method.replace('_', ' ')}")
            facts[name] |= process.call(method)

    def call_all(processes: Mapping[str, ContestantProcess], method: str) -> None:
        phase(f"all: {method.replace('_', ' ')}")
        for process in processes.values():
            process.send(method)
        for name, process in processes.items():
            facts.setdefault(name, {}).update(process.receive(method))

    with bar, ExitStack() as stack:
        if alone:
            for k, name in enumerate(abba(tuple(configs), 2 if repeats > 1 else 1)):
                half = repeats - repeats // 2 if k < len(configs) else repeats // 2
                with ContestantProcess(name, configs[name]) as process:
                    if name in facts:
                        process.call("first_batch")
                    else:
                        first_batch(name, process)
                        for method in parallel_calls:
                            call_all({name: process}, method)
                    phase(f"{name}: windows")
                    for _ in range(half):
                        timed_window(name, process)
                    facts[name] |= process.call("memory")
            return windows, facts
        processes = {
            name: stack.enter_context(ContestantProcess(name, configs[name])) for name in configs
        }
        # Imports are not timed. They take most contestants longer than everything else.
        call_all(processes, "ready")
        for name, process in processes.items():
            first_batch(name, process)
        for method in parallel_calls:
            call_all(processes, method)
        for k, name in enumerate(abba(tuple(configs), repeats)):
            if k % len(configs) == 0:
                phase(f"windows: round {k // len(configs) + 1} of {repeats}")
            timed_window(name, processes[name])
        for name, process in processes.items():
            facts[name] |= process.call("memory")
    return windows, facts
