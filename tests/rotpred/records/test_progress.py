"""Progress: log lines in a file, a bar on a terminal."""

from __future__ import annotations

import logging
import sys

import pytest

from rotpred.records import progress
from rotpred.records.progress import Progress


class Clock:
    """A clock that the test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_a_file_gets_a_line_where_a_minute_was_silent(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    work = Progress("features of x.beton", 2000, start=1000)
    clock.now += progress.LOG_EVERY_SECONDS - 1
    work.update(1100)
    assert not caplog.messages
    clock.now += 1
    work.update(1200)  # 200 of 1,000 steps in 60 s: steps before the start do not count
    assert caplog.messages == ["features of x.beton: 1,200 of 2,000 steps, 4 min 00 s left"]
    work.update(1300)
    clock.now += progress.LOG_EVERY_SECONDS - 1
    work.mark_logged()  # one interval of the log
    clock.now += progress.LOG_EVERY_SECONDS - 1
    work.update(1400)
    assert len(caplog.messages) == 1
    clock.now += 1
    work.update(2000)  # the end has its own message
    work.close()
    assert len(caplog.messages) == 1


def test_a_terminal_gets_a_bar_and_no_lines(
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    work = Progress("cifar10_svm", 60, start=30)
    clock.now += 10 * progress.LOG_EVERY_SECONDS
    work.update(45)
    work.close()
    shown = capsys.readouterr().err
    assert "cifar10_svm:" in shown and "30/60" in shown
    assert not caplog.messages


def test_nothing_done_has_no_time_left(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    work = Progress("x", 10)
    clock.now += 2 * progress.LOG_EVERY_SECONDS
    work.update(0)
    assert not caplog.messages
