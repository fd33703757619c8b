"""Contestants in processes of their own, which take turns; this side holds the whistle.

Importing FFCV changes torch's threads, DALI keeps pools, forked workers copy what their parent
holds: contestants in one process disturb one another. Each therefore lives in its own, is told over
a pipe what to do, and rests while others run.
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
"""Where the rooms of the benchmarks are imported from."""
PATIENCE_SECONDS = 300.0
"""For one answer, besides the length of the window: compilation of FFCV takes a minute or so."""


class ContestantError(ValueError):
    """A contestant failed, ended or fell silent; one line."""


class Contestant:
    """One process."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        """Start `contestants.process` with a configuration: its `kind` and that class's arguments."""
        self.name = name
        self._errors = tempfile.TemporaryFile()
        self._rest = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "contestants.process"],
            env={**os.environ, "PYTHONPATH": str(FOLDER)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        self._send(dict(config))

    @property
    def _out(self) -> Any:
        return self._process.stdout

    def ask(self, method: str, *, patience: float = PATIENCE_SECONDS, **arguments: Any) -> Any:
        """Call a method of the contestant and wait for what it returns.

        Raises:
            ContestantError: it raised, ended, or did not answer in time.
        """
        self.tell(method, **arguments)
        return self.hear(method, patience=patience)

    def tell(self, method: str, **arguments: Any) -> None:
        """Call a method, whose answer `hear` waits for: several contestants work at once then."""
        self._send({"method": method, "arguments": arguments})

    def hear(self, method: str, *, patience: float = PATIENCE_SECONDS) -> Any:
        """The answer to what was told first and not heard yet; raises as `ask` does."""
        answer = json.loads(self._line(method, patience))
        if "error" in answer:
            raise ContestantError(f"{self.name}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Let it end; it is killed if it does not."""
        self._selector.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._out.close()
        self._errors.close()

    def __enter__(self) -> Contestant:
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

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(message) + "\n").encode())
        except BrokenPipeError:
            raise ContestantError(f"{self.name} ended: {self._last_words()}") from None

    def _line(self, method: str, patience: float) -> bytes:
        deadline = time.monotonic() + patience
        while b"\n" not in self._rest:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise ContestantError(f"{self.name}: no answer to {method} for {patience:.0f} s")
            got = os.read(self._out.fileno(), 1 << 16)
            if not got:
                raise ContestantError(f"{self.name} ended: {self._last_words()}")
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _last_words(self) -> str:
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()
        if words:
            return words[-1]
        try:
            return f"exit status {self._process.wait(timeout=20)}"
        except subprocess.TimeoutExpired:
            return "it closed its pipe, said nothing, and still runs"


def compete(
    configs: Mapping[str, Mapping[str, Any]],
    *,
    repeats: int,
    seconds: float,
    questions: Sequence[str] = (),
    untimed: Sequence[str] = (),
    title: str = "",
    alone: bool = False,
) -> tuple[dict[str, list[Window]], dict[str, dict[str, Any]]]:
    """Let contestants take turns in ABBA order.

    Args:
        configs: by name; see `contestant.KINDS`.
        repeats: windows of each.
        seconds: length of a window.
        questions: methods that each answers after it has opened, before the windows; each returns
            a dictionary of fields. `memory` comes last, after the windows.
        untimed: further ones in which nothing is timed: all contestants answer them at once.
        title: of the progress bar, and of the lines on stderr that say what is being done.
        alone: each ends before the next one starts, because they would not fit into memory
            together: half of the windows forwards through the names, the others backwards.

    Returns:
        The windows by name, and by name the fields: `first_batch_seconds` and the answers.
    """
    windows: dict[str, list[Window]] = {name: [] for name in configs}
    facts: dict[str, dict[str, Any]] = {}
    bar = tqdm(total=repeats * len(configs), desc=title, unit="window", leave=False, disable=None)
    begin = time.monotonic()

    def phase(text: str) -> None:
        # A line, so that a log shows it, too, where there is no bar.
        bar.write(f"{title}: {time.monotonic() - begin:.0f} s: {text}", file=sys.stderr)

    def turn(name: str, player: Contestant) -> None:
        values = player.ask("window", seconds=seconds, patience=PATIENCE_SECONDS + seconds)
        windows[name].append(Window(*values))
        bar.update()

    def first(name: str, player: Contestant) -> None:
        phase(f"{name}: first batch")
        facts[name] = player.ask("first_batch")
        for question in questions:
            phase(f"{name}: {question.replace('_', ' ')}")
            facts[name] |= player.ask(question)

    def together(players: Mapping[str, Contestant], question: str) -> None:
        phase(f"all: {question.replace('_', ' ')}")
        for player in players.values():
            player.tell(question)
        for name, player in players.items():
            facts.setdefault(name, {}).update(player.hear(question))

    with bar, ExitStack() as stack:
        if alone:
            for k, name in enumerate(abba(tuple(configs), 2 if repeats > 1 else 1)):
                half = repeats - repeats // 2 if k < len(configs) else repeats // 2
                with Contestant(name, configs[name]) as player:
                    if name in facts:
                        player.ask("first_batch")
                    else:
                        first(name, player)
                        for question in untimed:
                            together({name: player}, question)
                    phase(f"{name}: windows")
                    for _ in range(half):
                        turn(name, player)
                    facts[name] |= player.ask("memory")
            return windows, facts
        players = {name: stack.enter_context(Contestant(name, configs[name])) for name in configs}
        # Imports take most of them longer than all else, and are not timed.
        together(players, "ready")
        for name, player in players.items():
            first(name, player)
        for question in untimed:
            together(players, question)
        for k, name in enumerate(abba(tuple(configs), repeats)):
            if k % len(configs) == 0:
                phase(f"windows: round {k // len(configs) + 1} of {repeats}")
            turn(name, players[name])
        for name, player in players.items():
            facts[name] |= player.ask("memory")
    return windows, facts
