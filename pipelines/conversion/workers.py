"""Worker processes that encode images, in order, and cannot hang their parent."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import traceback
import warnings
import zlib
from collections.abc import Generator, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from PIL import Image

from pipelines.conversion.encode import Options, PreparedImage, compile_encoder, prepare
from pipelines.imaging.decode import ImageError
from pipelines.samples import Samples

_AHEAD = 2  # Chunks queued per worker, so that it never waits for its parent.
_ANSWER_TIMEOUT_SECONDS = 600.0  # Timeout for an answer; a chunk takes seconds.
_WINDOW = 4  # Chunks per worker that may be issued ahead of the next to yield: bounds memory.


class WorkerError(RuntimeError):
    """A worker process died, failed or did not answer."""


class RejectedFile(NamedTuple):
    """A file that is not a usable image."""

    name: str
    """Relative path."""
    reason: str
    """Reason, in one line."""
    size: int
    """Size in bytes; 0 if it cannot be read."""


class Chunk(NamedTuple):
    """Results of a worker for consecutive samples."""

    first: int
    """Position of the first sample in the source."""
    results: list[tuple[PreparedImage, int] | RejectedFile]
    """Per sample the image and the CRC-32 of its bytes, or the rejected file."""


def prepare_images(
    source: Samples, *, options: Options, workers: int = 0, chunk: int = 64
) -> Generator[Chunk, None, None]:
    """Prepare all images of `source` in worker processes. Yields chunks in the source's order.

    Closing the generator kills the workers.

    Args:
        source: The images. The workers inherit them by fork.
        options: How to store them.
        workers: Number of worker processes. 0: one per available core.
        chunk: Samples per chunk.

    Raises:
        WorkerError: A worker was killed, did not answer, or met an error not due to one image.
    """
    compile_encoder()
    starts = range(0, len(source), chunk)
    count = min(workers or len(os.sched_getaffinity(0)), len(starts))
    pool = _WorkerPool(source, options, chunk, count)
    try:
        issued, held = 0, dict[int, Chunk]()
        for due, start in enumerate(starts):
            while start not in held:
                for connection in pool.idle():
                    if issued < len(starts) and issued - due < _WINDOW * count:
                        pool.submit(connection, starts[issued])
                        issued += 1
                for done in pool.receive():
                    held[done.first] = done
            yield held.pop(start)
    finally:
        pool.kill()


class _WorkerPool:
    """The worker processes and the pipes to them."""

    def __init__(self, source: Samples, options: Options, chunk: int, count: int) -> None:
        # fork shares an index of millions of paths, without a copy or pickling.
        context = multiprocessing.get_context("fork")
        self.busy: dict[Connection, list[int]] = {}
        self.processes: dict[Connection, BaseProcess] = {}
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work,
                    args=(theirs, [*self.busy, ours], source, options, chunk),
                    daemon=True,
                )
                process.start()
                theirs.close()
                self.busy[ours] = []
                self.processes[ours] = process
        except BaseException:
            self.kill()
            raise

    def idle(self) -> list[Connection]:
        """Return the pipes of workers that can take another chunk, the least busy first."""
        free = [pipe for pipe, jobs in self.busy.items() if len(jobs) < _AHEAD]
        return sorted(free, key=lambda pipe: len(self.busy[pipe]))

    def submit(self, pipe: Connection, start: int) -> None:
        """Request the chunk that starts at `start` from a worker."""
        self.busy[pipe].append(start)
        try:
            pipe.send(start)
        except OSError as error:
            raise self._dead(pipe) from error

    def receive(self) -> Iterator[Chunk]:
        """Wait for at least one chunk, or for a worker to die."""
        asked = [pipe for pipe, jobs in self.busy.items() if jobs]
        ready = wait(asked, timeout=_ANSWER_TIMEOUT_SECONDS)
        if not ready:
            first = min(min(self.busy[pipe]) for pipe in asked)
            raise WorkerError(
                f"no worker has answered for {_ANSWER_TIMEOUT_SECONDS:g} s (near sample {first})"
            )
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                answer = pipe.recv()
            except (EOFError, OSError) as error:
                raise self._dead(pipe) from error
            if isinstance(answer, str):
                raise WorkerError(f"a worker failed:\n{answer}")
            self.busy[pipe].remove(answer.first)
            yield answer

    def kill(self) -> None:
        """Kill all workers."""
        for process in self.processes.values():
            process.kill()
        for pipe, process in self.processes.items():
            process.join()
            process.close()
            pipe.close()
        self.processes.clear()

    def _dead(self, pipe: Connection) -> WorkerError:
        process = self.processes[pipe]
        process.join(timeout=5)
        code = process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        jobs = self.busy[pipe]
        return WorkerError(
            f"worker process {process.pid} died by {how}{hint} (near sample {min(jobs)})"
        )


def _work(
    pipe: Connection, others: list[Connection], source: Samples, options: Options, chunk: int
) -> None:
    """Main function of a worker: prepare the requested chunks until the parent exits."""
    # Garbage inherited from the parent is not finalised here: some finalizers wait for threads that
    # do not exist in this process.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent handles it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:  # Otherwise the pipes, and this process, would outlive the parent.
        other.close()
    # Pillow's warnings about unusual metadata, which is never stored.
    warnings.simplefilter("ignore", UserWarning)
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    try:
        while True:
            start = pipe.recv()
            stop = min(start + chunk, len(source))
            try:
                answer: Chunk | str = Chunk(
                    start, [_one(source, i, options) for i in range(start, stop)]
                )
            except Exception:
                answer = f"samples {start} to {stop - 1}\n{traceback.format_exc()}"
            pipe.send(answer)
    except (EOFError, OSError):
        os._exit(1)  # The parent has exited.


def _one(source: Samples, i: int, options: Options) -> tuple[PreparedImage, int] | RejectedFile:
    size = 0
    try:
        image = source.read(i)
        size = len(image) if isinstance(image, bytes) else image.nbytes
        result = prepare(image, options=options)
    except ImageError as error:
        return RejectedFile(source.name(i), str(error), size)
    return result, zlib.crc32(result.data)
