"""log.jsonl on disks that are full for a while."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rotpred.records.folder import read_rows
from rotpred.records.jsonl import JsonlWriter


def test_earlier_rows_are_dropped_although_the_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.jsonl"
    earlier = JsonlWriter(path, after=0)
    for step in (10, 20, 30):
        earlier.append({"step": step})
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    resumed = JsonlWriter(path, after=20)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        resumed.append({"step": 30, "again": True})
    assert path.read_bytes() == before
    monkeypatch.undo()
    for step in (30, 40):
        resumed.append({"step": step, "again": True})
    assert read_rows(path) == [
        {"step": 10},
        {"step": 20},
        {"step": 30, "again": True},
        {"step": 40, "again": True},
    ]
