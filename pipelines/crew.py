"""A few threads over a compiled function that lets go of the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait


class Crew:
    """Threads for the lanes of a batch, the caller's among them.

    Python's own: numba's parallel loops take twenty seconds to compile, have one size and one
    caller at a time for a whole process, and two of their layers die in a forked child.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._process = 0
        self._pool: ThreadPoolExecutor | None = None

    def run(self, work: Callable[[int], object], lanes: int) -> None:
        """Call work(0), ..., work(lanes - 1) at the same time, and return when all have ended.

        Args:
            work: compiled without the GIL, or next to nothing beside such a call.
            lanes: 1 to `most`; more than that wait for one another.

        Raises:
            BaseException: what the first lane that failed has raised.
        """
        if self._process != os.getpid():  # Threads of a parent do not survive a fork.
            self._process, self._pool = os.getpid(), None
        if self._pool is None and lanes > 1:
            self._pool = ThreadPoolExecutor(self._most - 1, thread_name_prefix="lane")
        others = [self._pool.submit(work, lane) for lane in range(1, lanes)] if self._pool else []
        try:
            work(0)
        finally:
            # Also where lane 0 failed: the others write to buffers that are used again.
            wait(others)
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads. They are made again when there is work."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown()
        self._pool = None
