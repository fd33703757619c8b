"""Console logging: handler, and the format of a progress line."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping


def configure_logging(*, rank: int = 0) -> None:
    """Log rotpred and pipelines to the console: everything on rank 0, warnings on other ranks.

    INFO goes to standard output, warnings and errors to standard error. A second call replaces the
    handler of the first one.
    """
    handler = Console()
    name = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s  {name}%(message)s", "%H:%M:%S"))
    for package in ("rotpred", "pipelines"):
        log = logging.getLogger(package)
        log.handlers = [h for h in log.handlers if not isinstance(h, Console)] + [handler]
        log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


class Console(logging.Handler):
    """Logging handler that writes around a progress bar and tolerates a closed stream.

    After the reader of a pipe exits (`| head`), `logging.StreamHandler` prints a traceback for
    every line, and the interpreter fails at exit when it flushes the rest.
    """

    def __init__(self) -> None:
        super().__init__()
        self._closed_streams: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line. The first failure of standard output is reported on standard error."""
        name = "stderr" if record.levelno >= logging.WARNING else "stdout"
        stream = getattr(sys, name)
        if name in self._closed_streams:
            return
        try:
            if stream is None:  # the process was started with the stream closed
                raise OSError("it is closed")
            line = self.format(record)
            if "tqdm" in sys.modules:  # only then can there be a bar to write around
                from tqdm import tqdm

                tqdm.write(line, file=stream)
            else:
                stream.write(line + "\n")
            stream.flush()
        except (OSError, ValueError) as error:  # ValueError: the file object was closed
            self._closed_streams.add(name)
            discard(name)
            if name == "stdout":
                logging.getLogger(__name__).warning(
                    "cannot write to standard output (%s): the run continues without it", error
                )


def discard(name: str) -> None:
    """Redirect a stream to /dev/null, so that the flush at exit does not fail."""
    stream = getattr(sys, name)
    if stream is None or stream.closed:
        return
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # a stream without a file, in a notebook or a test
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def describe(row: Mapping[str, object], *, values: Mapping[str, float], total_steps: int) -> str:
    """Format a row of log.jsonl as a console line, with aligned columns."""
    width = len(str(total_steps))
    parts = [f"step {row['step']:>{width}}/{total_steps}", f"epoch {row['epoch']}"]
    for name, value in values.items():
        match name:
            case "accuracy":
                parts.append(f"accuracy {value:5.1f} %")
            case "loss":
                parts.append(f"loss {value:.4f}")
            case _:
                parts.append(f"{name} {value:.4g}")
    memory = row.get("cuda_peak_mib", row["rss_mib"])
    assert isinstance(memory, int | float)
    parts += [
        f"{_rate(row['images_per_s'])} images/s",
        f"{_rate(row['views_per_s'])} views/s",
        f"data wait {row['data_wait_percent']:.0f} %",
        f"{'GPU' if 'cuda_peak_mib' in row else 'memory'} {memory / 1024:.1f} GiB",
    ]
    left = row["seconds_left"]
    if isinstance(left, int | float):
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def _rate(per_second: object) -> str:
    """Format a rate, with a decimal below 10: a large network on a CPU does one image/s."""
    value = float(str(per_second))
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """Format a duration: 42 s, 12 min 03 s, 5 h 07 min, 2 d 03 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
