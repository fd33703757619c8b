"""log.jsonl: one JSON object per log interval, through full disks and resumed runs."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

from rotpred.files import write_atomic
from rotpred.records.folder import read_rows, row_step


class Rows:
    """Appends to one log.jsonl; any method may raise `OSError`, and may be called again then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened = False
        self._torn = False

    def open(self, *, after: int) -> None:
        """Before the first row: drop those beyond step `after`, whose work is done again.

        Later calls do nothing.
        """
        if self._opened:
            return
        self._opened = True
        if self._path.exists():
            rows = [row for row in read_rows(self._path) if row_step(row) <= after]
            write_atomic(self._path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def append(self, row: Mapping[str, object]) -> None:
        """Append one line. Opened each time, so that a disk that has room again is used again."""
        # After a write that a full disk cut short, the next row starts on a line of its own.
        data = (b"\n" if self._torn else b"") + (json.dumps(row) + "\n").encode()
        with self._path.open("ab", buffering=0) as file:
            written = file.write(data)
        if written != len(data):
            self._torn = self._torn or bool(written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._torn = False
