"""When a loader waits for its device, and which time counts as waiting for data.

Copies to a GPU are tested in tests/gpu/test_training.py; clock and device are fakes here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pipelines.batch import RawBatch
from pipelines.device.transfer import Transfer
from pipelines.engines.source import DecodeErrorBudget
from pipelines.loader import Loader
from pipelines.spec import CenterCrop, LoaderSpec

STEPS = 3
CPU = torch.device("cpu")


class _Engine:
    """Takes two seconds for each batch and logs its calls."""

    def __init__(self, log: list[str]) -> None:
        self.decode_errors, self.now, self._log = DecodeErrorBudget(0), 0.0, log

    def __len__(self) -> int:
        return STEPS

    def epoch(self, _epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        small = torch.zeros(2, dtype=torch.int64)
        images = torch.zeros((2, 4, 4, 3), dtype=torch.uint8)
        boxes = torch.zeros((2, 5), dtype=torch.int32)
        try:
            for _ in range(start_step, STEPS):
                self._log.append("decode")
                self.now += 2.0
                yield RawBatch(images, small, small, small == 0, boxes)
        finally:
            self._log.append("end")

    def close(self) -> None:
        self._log.append("close")


class _Late(Transfer):
    """A device that lags 50 seconds behind, or fails."""

    def __init__(self, engine: _Engine, log: list[str]) -> None:
        super().__init__(CPU)
        self.broken, self._engine, self._log = False, engine, log

    def wait(self) -> None:
        self._log.append("wait")
        self._engine.now += 50.0
        if self.broken:
            raise RuntimeError("device lost")


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def engine(log: list[str]) -> _Engine:
    return _Engine(log)


@pytest.fixture
def loader(engine: _Engine, log: list[str], monkeypatch: pytest.MonkeyPatch) -> Loader:
    monkeypatch.setattr("pipelines.loader.time.perf_counter", lambda: engine.now)
    spec = LoaderSpec(batch_size=2, crop=CenterCrop(4, None))
    made = Loader(engine, spec, engine="stub", device=CPU)
    made._transfer = _Late(engine, log)
    return made


def test_waiting_for_the_device_is_not_waiting_for_data(loader: Loader, log: list[str]) -> None:
    assert len(list(loader.epoch(0))) == STEPS
    assert loader.wait_seconds == 2.0 * STEPS
    # Before every batch, because the engine overwrites the buffers of the previous one.
    assert log[: 2 * STEPS] == ["wait", "decode"] * STEPS


def test_the_last_copy_ends_before_buffers_are_freed(loader: Loader, log: list[str]) -> None:
    epoch = loader.epoch(0)
    next(epoch)
    epoch.close()
    loader.close()
    assert log == ["wait", "decode", "wait", "end", "wait", "close"]


def test_a_broken_device_still_lets_the_engine_end(loader: Loader, log: list[str]) -> None:
    epoch = loader.epoch(0)
    next(epoch)
    assert isinstance(loader._transfer, _Late)
    loader._transfer.broken = True
    for end in (epoch.close, loader.close):
        with pytest.raises(RuntimeError, match="device lost"):
            end()
    assert log[-4:] == ["wait", "end", "wait", "close"]
