"""Errors of a job: one line, once per machine, and in torchrun's summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rotpred.program import report_error


def test_an_error_is_printed_once_per_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torchrun lays out its folders: one for each local rank, in one for each attempt."""
    for rank, text in ((0, "error: no data"), (1, "error: no data"), (2, "error: disk full")):
        file = tmp_path / "attempt_0" / str(rank) / "error.json"
        file.parent.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        report_error(text)
        note = json.loads(file.read_text())["message"]
        assert note["message"] == note["extraInfo"]["py_callstack"] == text
    assert capsys.readouterr() == ("", "error: no data\nerror: disk full\n")


def test_without_torchrun_it_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    report_error("error: no data")
    assert capsys.readouterr().err == "error: no data\n"


def test_a_full_disk_does_not_hide_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing can be written where torchrun keeps its files."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/full/0/error.json")
    report_error("error: no space left")
    assert capsys.readouterr().err == "error: no space left\n"
