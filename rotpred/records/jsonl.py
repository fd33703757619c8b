"""Writer of log.jsonl: one JSON object per log interval; survives full disks and resumed runs."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

from pipelines.storage import write_atomic
from rotpred.records.folder import read_rows, row_step


class JsonlWriter:
    """Appends to one log.jsonl.

    The first row drops the rows beyond step `after` of an earlier run: those steps are repeated.
    """

    def __init__(self, path: Path, *, after: int) -> None:
        self._path = path
        self._after = after
        self._pruned = False
        self._torn = False

    def append(self, row: Mapping[str, object]) -> None:
        """Append one line. The file is opened each time: writing resumes once the disk has room.

        Raises:
            OSError: The earlier rows cannot be rewritten, and the file is unchanged; or the row
                cannot be written completely. The next call tries again.
        """
        if not self._pruned:
            self._prune()
            self._pruned = True  # not after an error
        # After a write that a full disk cut short, start the next row on a new line.
        data = (b"\n" if self._torn else b"") + (json.dumps(row) + "\n").encode()
        with self._path.open("ab", buffering=0) as file:
            written = file.write(data)
        if written != len(data):
            self._torn = self._torn or bool(written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._torn = False

    def _prune(self) -> None:
        if self._path.is_file():  # a device may be endless
            rows = [row for row in read_rows(self._path) if row_step(row) <= self._after]
            write_atomic(self._path, "".join(json.dumps(row) + "\n" for row in rows).encode())
