"""Writer of log.jsonl: one JSON object per log interval; survives full disks and resumed runs."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

from rotpred.files import write_atomic
from rotpred.records.folder import read_rows, row_step


class JsonlWriter:
    """Appends to one log.jsonl. Any method may raise `OSError` and may then be called again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened = False
        self._torn = False

    def open(self, *, after: int) -> None:
        """Drop the rows beyond step `after`: those steps are about to be repeated.

        Call it before the first row. Once it has succeeded, later calls do nothing.

        Raises:
            OSError: The file cannot be read or rewritten. It is unchanged.
        """
        if self._opened:
            return
        if self._path.exists():
            rows = [row for row in read_rows(self._path) if row_step(row) <= after]
            write_atomic(self._path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._opened = True  # last: after an error the next call must try again

    def append(self, row: Mapping[str, object]) -> None:
        """Append one line. The file is opened each time: writing resumes once the disk has room.

        Raises:
            OSError: The row cannot be written completely.
        """
        # After a write that a full disk cut short, start the next row on a new line.
        data = (b"\n" if self._torn else b"") + (json.dumps(row) + "\n").encode()
        with self._path.open("ab", buffering=0) as file:
            written = file.write(data)
        if written != len(data):
            self._torn = self._torn or bool(written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._torn = False
