"""A few threads over a compiled function that lets go of the GIL, and one that may get stuck."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any


class LaneThreads:
    """Threads for the lanes of a batch, the caller's among them.

    Python's own: numba's parallel loops take twenty seconds to compile, have one size and one
    caller at a time for a whole process, and two of their layers die in a forked child.
    """

    def __init__(self, most: int, name: str = "lane") -> None:
        self._most, self._name = most, name
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
            self._pool = ThreadPoolExecutor(self._most - 1, thread_name_prefix=self._name)
        others: list[Future[object]] = []
        try:
            if self._pool is not None:
                others.extend(self._pool.submit(work, lane) for lane in range(1, lanes))
            work(0)
        finally:
            # Also where lane 0, or starting another, failed: those that run write to buffers that
            # are used again.
            wait(others)
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads. They are made again when there is work."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown()
        self._pool = None


_Calls = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class DaemonWorker:
    """One thread for calls that may never return: the end of the process does not wait for it.

    A pool's threads are joined when the interpreter ends, however long that takes.
    """

    def __init__(self, name: str) -> None:
        self._calls: _Calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=_run, args=(self._calls,), name=name, daemon=True)
        self._thread.start()
        weakref.finalize(self, self._calls.put, None)  # A runner that is dropped ends, too.

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Call work() behind all that was submitted before."""
        done: Future[Any] = Future()
        self._calls.put((done, work))
        return done

    def close(self, seconds: float) -> bool:
        """End the thread behind all that was submitted and not cancelled.

        Returns:
            Whether it has ended within so many seconds.
        """
        self._calls.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()


def _run(calls: _Calls) -> None:
    while (call := calls.get()) is not None:
        done, work = call
        if done.set_running_or_notify_cancel():
            try:
                done.set_result(work())
            except BaseException as error:  # handed to who waits for the result
                done.set_exception(error)
        del call, done, work  # Else kept until the next call.
