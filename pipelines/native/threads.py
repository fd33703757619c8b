"""Threads for functions that release the GIL, and for calls that may block forever."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any


class LaneThreads:
    """A thread pool for the lanes of a batch. The caller's thread works on lane 0.

    The threads are Python's. numba's parallel loops take twenty seconds to compile, allow one size
    and one caller at a time per process, and two of their threading layers fail in a forked child.
    """

    def __init__(self, max_threads: int, name: str = "lane") -> None:
        self._max_threads, self._name = max_threads, name
        self._process = 0
        self._pool: ThreadPoolExecutor | None = None

    def run(self, work: Callable[[int], object], lanes: int) -> None:
        """Call work(0), ..., work(lanes - 1) in parallel, and return when all have ended.

        Args:
            work: A function that spends its time in compiled code without the GIL.
            lanes: 1 to `max_threads`; lanes beyond that wait for a free thread.

        Raises:
            BaseException: Whatever a lane has raised; of several errors, that of the lowest lane.
        """
        if self._process != os.getpid():  # Threads of the parent do not survive a fork.
            self._process, self._pool = os.getpid(), None
        if self._pool is None and lanes > 1:
            self._pool = ThreadPoolExecutor(self._max_threads - 1, thread_name_prefix=self._name)
        others: list[Future[object]] = []
        try:
            if self._pool is not None:
                others.extend(self._pool.submit(work, lane) for lane in range(1, lanes))
            work(0)
        finally:
            # Wait even if lane 0 or the start of a thread has failed: the running lanes write to
            # buffers that are reused.
            wait(others)
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads. The next `run` starts new ones."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown()
        self._pool = None


_Calls = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class DaemonWorker:
    """A daemon thread for calls that may never return.

    The process can exit while it is blocked. The interpreter would join the threads of a
    ThreadPoolExecutor at exit, however long that takes.
    """

    def __init__(self, name: str) -> None:
        self._calls: _Calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=_run, args=(self._calls,), name=name, daemon=True)
        self._thread.start()
        weakref.finalize(self, self._calls.put, None)  # Ends the thread of a dropped worker.

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Queue work() after all earlier calls."""
        done: Future[Any] = Future()
        self._calls.put((done, work))
        return done

    def close(self, seconds: float) -> bool:
        """End the thread after all submitted calls that are not cancelled.

        Args:
            seconds: How long to wait for that.

        Returns:
            Whether the thread has ended.
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
            except BaseException as error:  # Re-raised by `Future.result`.
                done.set_exception(error)
        del call, done, work  # Otherwise kept alive until the next call.
