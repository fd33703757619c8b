"""Errors of a job: one line, once per machine, and in torchrun's summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rotpred.program import exit_status, report_error


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


def test_torchruns_summary_shows_the_traceback_of_our_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "attempt_0" / "0" / "error.json"
    file.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    def mistaken() -> int:
        raise TypeError("not a recipe")

    with pytest.raises(TypeError, match="not a recipe"):
        exit_status("error", mistaken)
    note = json.loads(file.read_text())["message"]
    assert note["message"] == "TypeError: not a recipe"
    assert "in mistaken\n" in note["extraInfo"]["py_callstack"]


@pytest.mark.parametrize("kind", [ValueError, OSError, ImportError])
def test_what_a_user_can_change_is_one_line_unless_debugging(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> int:
        raise kind("no data\n  in x")

    monkeypatch.delenv("ROTPRED_DEBUG", raising=False)
    assert exit_status("convert", fails) == 2
    assert capsys.readouterr().err == "convert: no data in x (ROTPRED_DEBUG=1 shows where)\n"
    monkeypatch.setenv("ROTPRED_DEBUG", "1")
    with pytest.raises(kind, match="no data"):
        exit_status("convert", fails)
