"""Atomic files and locks: leftovers of dead writers, file systems that cannot lock, full disks."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

import pytest

from pipelines.storage import (
    LockedError,
    locked,
    read_json,
    remove_leftovers,
    replaced,
    replaced_together,
    sha256_file,
    temporary_of,
    write_atomic,
    write_json,
)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_leftovers_of_one_file_are_told_from_those_of_others(tmp_path: Path) -> None:
    """The names of two outputs may begin alike, and a temporary name holds a process id."""
    foreign = [".a.x.tmp", ".a.7.tmp.x", "a.7.tmp", "ab.tmp.7", "a.tmp.x", "a.tmp.7.json"]
    others = [".a.7.b.7.tmp", ".ab.7.tmp", *foreign]
    for name in (*others, ".a.7.tmp", "a.tmp.7", "a.tmp.7.segments"):
        (tmp_path / name).touch()
    (tmp_path / ".a.12.tmp").mkdir()
    (tmp_path / ".a.12.tmp/part").touch()
    remove_leftovers(tmp_path, "a")
    assert listing(tmp_path) == sorted(others)
    remove_leftovers(tmp_path)
    assert listing(tmp_path) == sorted(foreign)


def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    digest = write_atomic(path, b"old")
    assert digest == sha256_file(path)
    with pytest.raises(KeyError), replaced(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyError
    with pytest.raises(ValueError, match="no space for x in"), replaced(path, size=1 << 60):
        pytest.fail("the body must not run")
    monkeypatch.setattr("pipelines.storage.sha256_file", lambda _: "0" * 64)
    with pytest.raises(OSError, match="differs from what was written"):
        write_atomic(path, b"new")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))
    assert path.read_bytes() == b"old" and listing(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"x\.json is not JSON \("),
        ("[" * 100_000, r"x\.json is not JSON \("),
        ("[]", r"x\.json is not usable: expected a dict in JSON, found a list; move"),
    ],
)
def test_foreign_json_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_json(tmp_path / "x.json", dict)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_lock_names_its_holder_and_sweeps(tmp_path: Path, kind: str) -> None:
    target = tmp_path if kind == "folder" else tmp_path / "out"
    stale = tmp_path / ".out.4194305.tmp"
    stale.touch()
    holder = f"{target} is in use by process {os.getpid()} on .*: wait"
    with locked(target, hint="wait"):
        assert not stale.exists()
        stale.touch()
        with pytest.raises(LockedError, match=holder), locked(target, hint="wait"):
            pytest.fail("two hold the lock")
        assert stale.exists(), "only the holder may remove temporary files"
    stale.unlink()
    assert listing(tmp_path) == ([".lock"] if kind == "folder" else [])
    with locked(target, hint=""):
        pass


def test_a_lock_file_that_was_removed_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder before removes the file after the next one has opened it."""
    target, path, removed = tmp_path / "out", tmp_path / "out.lock", []
    flock = fcntl.flock

    def late(file: int, kind: int) -> None:
        if not removed:
            removed.append(path.stat().st_ino)
            path.unlink()
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(target, hint=""), pytest.raises(LockedError), locked(target, hint=""):
        pytest.fail("two hold the lock")
    assert removed


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder is used with a warning, and nothing of others is removed. A file is not written."""

    def none(_file: int, _kind: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    other = temporary_of(tmp_path / "array")
    other.touch()
    with caplog.at_level(logging.WARNING), locked(tmp_path, hint=""):
        assert other.exists()
    assert "No locks available" in caplog.text
    with pytest.raises(OSError, match="No locks available"), locked(tmp_path / "out", hint=""):
        pytest.fail("not locked")


def test_a_folder_that_cannot_be_removed_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS a file that is open stays in its folder, as .nfsXXXX."""

    def busy(_path: Path) -> None:
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(os, "rmdir", lambda path, **_: busy(path))
    with pytest.raises(KeyError), replaced_together(tmp_path / "x", ("",)):
        raise KeyError
    monkeypatch.undo()
    assert listing(tmp_path) == [temporary_of(tmp_path / "x").name]
    with locked(tmp_path / "x", hint=""):
        assert listing(tmp_path) == ["x.lock"]
