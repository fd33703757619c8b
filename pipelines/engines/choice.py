"""Choice of the engine for a data set, and opening both."""

from __future__ import annotations

import contextlib
import importlib
import logging

import torch

from pipelines.engines.autotune import autotune, thread_budget
from pipelines.engines.source import Source
from pipelines.samples import Samples, open_samples
from pipelines.spec import Engine, LoaderSpec, Shard, check_options

log = logging.getLogger(__name__)

ENGINES = {
    "ffcv": ("pipelines.engines.ffcv.source", "ffcv"),
    "dali": ("pipelines.engines.dali.source", "nvidia.dali"),
    "folder": ("pipelines.engines.folder", "torchvision"),
}
"""Module and third-party package of each engine."""


def missing_engines() -> dict[str, str]:
    """Return the engines that cannot be used here, each with a reason in one line.

    Imports the packages of all engines.
    """
    reasons = {engine: missing_reason(engine) for engine in ENGINES}
    return {engine: reason for engine, reason in reasons.items() if reason is not None}


def missing_reason(engine: str) -> str | None:
    """Return why an engine cannot be used here in one line, or None if it can.

    Imports the engine's package, which may take seconds.

    Args:
        engine: ffcv, dali or folder.
    """
    module, package = ENGINES[engine]
    try:
        # Our module, not the bare package: it undoes the side effects of importing ffcv on torch.
        importlib.import_module(module)
    except (ImportError, OSError, AttributeError, TypeError, RuntimeError) as error:
        # The last three are raised by packages built for another version of numpy or numba.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{package} cannot be imported ({reason})"
    return None


def choose_engine(spec: LoaderSpec, *, raw: bool = False) -> Engine:
    """Return the engine to use. `auto` means the fastest one installed; logs why.

    Args:
        spec: Gives the data and the engine.
        raw: Whether the beton holds uncompressed samples, which DALI cannot read.

    Raises:
        ValueError: The engine that the spec names cannot read this data, or is not installed.
    """
    beton = spec.data.endswith(".beton")
    if spec.data == "synthetic" or spec.engine == "synthetic":
        if spec.engine not in ("auto", "synthetic"):
            raise ValueError(f'data "synthetic" needs engine synthetic, not {spec.engine}')
        return "synthetic"
    if spec.engine == "ffcv" and not beton:
        raise ValueError(
            f"{spec.data}: engine=ffcv reads .beton files; convert it with scripts/to_beton.py"
        )
    if spec.engine == "folder":
        return "folder"
    if spec.engine != "auto":
        missing = missing_reason(spec.engine)
        if missing is not None:
            raise ValueError(f"engine={spec.engine}: {missing}; README says how to install it")
        return spec.engine
    ranking: tuple[Engine, ...] = ("ffcv", "dali", "folder")
    notes = []
    for engine in ranking:
        if engine == "ffcv" and not beton:
            notes.append("not ffcv: it reads .beton files only")
        elif engine == "dali" and spec.max_undecodable:
            notes.append("not dali: it cannot mask undecodable samples (max_undecodable)")
        elif engine == "dali" and raw:
            notes.append("not dali: it cannot read uncompressed samples")
        elif (missing := missing_reason(engine)) is not None:
            notes.append(f"not {engine}: {missing}")
        else:
            reason = "; ".join(notes) if notes else "the fastest for a .beton file"
            log.info("engine %s for %s: %s", engine, spec.data, reason)
            return engine
    raise ValueError(f"no engine can read {spec.data}: " + "; ".join(notes))


def open_engine(
    spec: LoaderSpec, shard: Shard | None, device: torch.device
) -> tuple[Engine, Source, Samples | None]:
    """Open a data set with the engine that suits it; autotune its threads if `spec.workers` is 0.

    Imports the engine's package, which may take seconds.

    Arguments and errors are those of `pipelines.loader.open_loader`.

    Returns:
        Name of the engine; the engine, which closes the data set; the data set, None if synthetic.
    """
    shard = shard or Shard()
    with contextlib.ExitStack() as opened:  # Closes what is open after an error.
        # Check the options first: a beton opens at once, a folder of a million files does not.
        samples = None
        if spec.engine != "synthetic" and spec.data.endswith(".beton"):
            samples = open_samples(spec.data, spec.root)
            opened.callback(samples.close)
        beton = None if samples is None else samples.beton
        engine = choose_engine(spec, raw=beton is not None and beton.raw)
        check_options(spec, engine, on_gpu=device.type == "cuda")
        if engine == "synthetic":
            from pipelines.engines.synthetic import SyntheticSource

            return engine, SyntheticSource(spec, shard=shard, device=device), None
        if samples is None:
            samples = open_samples(spec.data, spec.root)
        limit = thread_budget(spec, shard, device)
        workers = spec.workers or limit.threads
        source: Source
        match engine:
            case "ffcv":
                from pipelines.engines.ffcv.source import FfcvSource

                assert beton is not None
                source = FfcvSource(beton, spec, shard=shard, workers=workers)
            case "dali":
                from pipelines.engines.dali.source import DaliSource

                source = DaliSource(samples, spec, shard=shard, workers=workers, device=device)
            case _:
                from pipelines.engines.folder import FolderSource

                pin = device.type == "cuda"
                source = FolderSource(samples, spec, shard=shard, workers=workers, pin=pin)
        opened.callback(source.close)
        if spec.workers == 0:
            autotune(source, spec, limit)
        opened.pop_all()
        return engine, source, samples
