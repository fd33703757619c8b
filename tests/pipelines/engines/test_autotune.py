"""Autotuning of decoding threads: the share of the cores, and the trials within it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch

from pipelines.batch import RawBatch
from pipelines.engines import autotune
from pipelines.engines.source import DecodeErrorBudget, Source
from pipelines.loader import open_loader
from pipelines.spec import LoaderSpec, RandomResizedCrop, Shard
from tests.support.engines import engines, epoch_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cores", "processes", "given", "device", "threads"),
    [
        (16, 1, None, "cpu", 16),
        (16, 1, None, "cuda", 6),
        (128, 8, None, "cuda", 6),
        (2, 4, None, "cpu", 1),
        (1, 1, 0.01, "cpu", 1),
        (100, 1, 0.29, "cuda", 29),
        (10, 3, 1.0, "cuda", 3),
    ],
)
def test_the_budget_is_a_share_of_the_allowed_cores(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    processes: int,
    given: float | None,
    device: str,
    threads: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    shard = Shard(0, processes, processes)
    spec = LoaderSpec(cpu_budget=given)
    assert autotune.thread_budget(spec, shard, torch.device(device)).threads == threads


class _Clocked:
    """A source with a fake clock, whose rate is a function of its number of threads."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, rate: Callable[[int], float], *, batch: int = 100
    ) -> None:
        self.decode_errors, self.workers, self.now, self.open = DecodeErrorBudget(0), 16, 0.0, 0
        self.tried: list[int] = []
        self._rate, self._batch = rate, batch
        monkeypatch.setattr("pipelines.engines.autotune.time.perf_counter", lambda: self.now)

    def __len__(self) -> int:
        return 100_000 // self._batch

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[RawBatch, None, None]:
        assert epoch == 0
        self.tried.append(self.workers)
        self.open += 1
        none = torch.zeros(0)
        try:
            for _ in range(start_step, len(self)):
                # In a trial, neither counted nor an error.
                self.decode_errors.report("image", "broken")
                self.now += self._batch / self._rate(self.workers)
                yield RawBatch(none, none, none, none, none)
        finally:
            self.open -= 1

    def close(self) -> None:
        """Nothing to release."""


def chosen(source: Source, batch: int = 100, threads: int = 16) -> None:
    spec = LoaderSpec(batch_size=batch)
    autotune.autotune(source, spec, autotune.Budget(threads, 1.0, threads, 1))


def test_the_fewest_threads_that_are_as_fast(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipelines.engines.autotune")
    source = _Clocked(monkeypatch, lambda n: 1000.0 * min(n, 4) - n)
    chosen(source)
    assert source.workers == 4 and source.open == 0
    assert source.tried == [16, 16, 8, 4, 2]  # the first trial only reads the data
    assert source.decode_errors.total == 0 and source.now < 4
    (line,) = caplog.messages
    assert line == (
        "decoding threads: 4 of a budget of 16 (1 of 16 cores); images/s: "
        "3984 with 16, 3992 with 8, 3996 with 4, 1998 with 2"
    )


def test_all_threads_where_each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    source = _Clocked(monkeypatch, lambda n: 300.0 * n)
    chosen(source)
    assert source.workers == 16 and source.tried == [16, 16, 8]


def test_more_threads_may_be_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    source = _Clocked(monkeypatch, lambda n: 20_000.0 / n)
    chosen(source)
    assert source.workers == 1 and source.tried == [16, 16, 8, 4, 2, 1]


def test_trials_end_in_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipelines.engines.autotune")
    slow = _Clocked(monkeypatch, lambda _n: 60.0)
    chosen(slow)
    assert slow.workers == 16 and slow.tried == [16]
    assert "a batch takes 1.7 s, too long for trials" in caplog.text
    middling = _Clocked(monkeypatch, lambda _n: 300.0)
    chosen(middling)
    assert middling.tried == [16, 16] and middling.now < 2


def test_a_slow_first_reading_keeps_all_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The time went into waiting for the disk, and several threads can wait at once."""
    caplog.set_level(logging.INFO, "pipelines.engines.autotune")
    source = _Clocked(monkeypatch, lambda _n: 4000.0 if len(source.tried) > 1 else 500.0)
    chosen(source)
    assert source.workers == 16
    assert "all of them, because the first reading ran at 500" in caplog.text


def test_an_error_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(_n: int) -> float:
        raise ValueError("too small for a crop")

    source = _Clocked(monkeypatch, rate)
    with pytest.raises(ValueError, match="too small"):
        chosen(source)
    assert source.open == 0 and not source.decode_errors.paused


@pytest.mark.parametrize("engine", engines("folder", "ffcv", "dali"))
def test_trials_change_nothing_that_is_emitted(
    beton: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, engine: str
) -> None:
    caplog.set_level(logging.INFO, "pipelines.engines.autotune")
    monkeypatch.setattr(autotune, "_LEAST_SAMPLES", 30)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    spec = LoaderSpec(
        data=str(beton), engine=engine, batch_size=3, crop=RandomResizedCrop(24), drop_last=False
    )  # type: ignore[arg-type]
    with open_loader(spec) as tuned:
        (line,) = caplog.messages
        assert " 2 (1 of 2 cores)" in line
        assert ("fixed when it is opened" if engine == "dali" else "images/s: ") in line
        given = LoaderSpec(**{**vars(spec), "workers": 1})
        with open_loader(given) as fixed:
            assert len(caplog.messages) == 1  # unchanged, without a trial
            for epoch in (0, 1):
                for ours, theirs in zip(
                    epoch_of(tuned, epoch), epoch_of(fixed, epoch), strict=True
                ):
                    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            assert tuned.digest == fixed.digest and tuned.source.decode_errors.total == 0


def test_a_short_epoch_is_not_worth_trials(
    beton: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipelines.engines.autotune")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    spec = LoaderSpec(data=str(beton), engine="folder", batch_size=3)
    with open_loader(spec, shard=Shard(0, 2, 2)):
        (line,) = caplog.messages
    assert line == (
        "decoding threads: 4 (1 of 8 cores among 2 processes), the whole budget: "
        "the epoch is too short for trials"
    )
