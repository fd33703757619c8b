"""Worker processes that prepare images, in order, and that cannot hang their parent."""

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

from pipelines.conversion.encode import Options, Prepared, compile_encoder, prepare
from pipelines.datasets.images import Images
from pipelines.imaging.decode import ImageError

_AHEAD = 2  # Chunks given to a worker at a time: it never waits for its parent.
_PATIENCE_SECONDS = 600.0  # For any answer; a chunk takes seconds.
_WINDOW = 4  # Chunks per worker that may be finished before the one that is due: bounds memory.


class WorkerError(RuntimeError):
    """A worker process died or failed."""


class Rejected(NamedTuple):
    """A file that is no usable image."""

    name: str
    """Its relative path."""
    reason: str
    """Why, in one line."""
    size: int
    """Its length in bytes; 0 where it cannot be read."""


class Chunk(NamedTuple):
    """What a worker made of consecutive samples."""

    first: int
    """Position of the first sample in the source."""
    results: list[tuple[Prepared, int] | Rejected]
    """Each with the CRC-32 of its bytes, or rejected."""


def prepared(
    source: Images, *, options: Options, workers: int = 0, chunk: int = 64
) -> Generator[Chunk, None, None]:
    """Prepare all images of `source` in worker processes; chunks come in the source's order.

    Closing the generator ends the workers, however far they are.

    Args:
        source: The images; the workers inherit it by fork.
        options: How to store them.
        workers: Processes; 0 takes one for each core that this process may use.
        chunk: Samples per message.

    Raises:
        WorkerError: A worker was killed, or met an error that is not about one image.
    """
    compile_encoder()
    starts = range(0, len(source), chunk)
    count = min(workers or len(os.sched_getaffinity(0)), len(starts))
    team = _Team(source, options, chunk, count)
    try:
        issued, held = 0, dict[int, Chunk]()
        for due, start in enumerate(starts):
            while start not in held:
                for connection in team.idle():
                    if issued < len(starts) and issued - due < _WINDOW * count:
                        team.give(connection, starts[issued])
                        issued += 1
                for done in team.receive():
                    held[done.first] = done
            yield held.pop(start)
    finally:
        team.kill()


class _Team:
    """The worker processes and the pipes to them."""

    def __init__(self, source: Images, options: Options, chunk: int, count: int) -> None:
        # fork: an index of millions of paths is shared, not copied or pickled.
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
        """Pipes to workers that can be given more, the least busy first."""
        free = [pipe for pipe, jobs in self.busy.items() if len(jobs) < _AHEAD]
        return sorted(free, key=lambda pipe: len(self.busy[pipe]))

    def give(self, pipe: Connection, start: int) -> None:
        """Ask a worker for the chunk that begins at `start`."""
        self.busy[pipe].append(start)
        try:
            pipe.send(start)
        except OSError as error:
            raise self._dead(pipe) from error

    def receive(self) -> Iterator[Chunk]:
        """Wait for at least one chunk, or for a worker's death."""
        asked = [pipe for pipe, jobs in self.busy.items() if jobs]
        ready = wait(asked, timeout=_PATIENCE_SECONDS)
        if not ready:
            near = min(min(self.busy[pipe]) for pipe in asked)
            raise WorkerError(
                f"no worker has answered for {_PATIENCE_SECONDS:g} s (near sample {near})"
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
        """End all workers at once."""
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
        hint = "; was memory short?" if code == -signal.SIGKILL else ""
        jobs = self.busy[pipe]
        return WorkerError(
            f"worker process {process.pid} died by {how}{hint} (near sample {min(jobs)})"
        )


def _work(
    pipe: Connection, others: list[Connection], source: Images, options: Options, chunk: int
) -> None:
    """Life of a worker: prepare the chunks it is asked for until its parent is gone."""
    # What the parent has thrown away is the parent's to finalise: its threads, for which some of it
    # would wait, are not here.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:  # Or the pipes would outlive the parent, and with them this process.
        other.close()
    # Pillow's remarks about odd metadata, which is never stored as such.
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
        os._exit(1)  # The parent is gone: nobody to tell.


def _one(source: Images, i: int, options: Options) -> tuple[Prepared, int] | Rejected:
    size = 0
    try:
        image = source.read(i)
        size = len(image) if isinstance(image, bytes) else image.nbytes
        result = prepare(image, options=options)
    except (ImageError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Rejected(source.name(i), reason, size)
    return result, zlib.crc32(result.data)
