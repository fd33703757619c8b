"""Features of a frozen backbone over whole data sets, computed once and kept on disk.

A row per sample, whatever the number of processes: padding is dropped, and rows lie in the order of
the samples' indices. A stage is computed only where the folder does not have it yet, so that sweeps
over classifiers read files; of jobs that want the same features at once, one computes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipelines.loader import Loader
from pipelines.spec import LoaderSpec, Precision
from rotpred.distributed import Rank, barrier, broadcast_str, check_equal, gather_rows
from rotpred.features.base import AVGPOOL, Features, Store
from rotpred.features.npy_writer import Append, alone, rows
from rotpred.files import check_space, plain, write_json
from rotpred.models.base import Backbone
from rotpred.models.heads import pooled_dims, stage_pools
from rotpred.records.progress import Progress
from rotpred.training.data import open_data
from rotpred.training.precision import autocast
from rotpred.training.settings import RunSettings

logger = logging.getLogger(__name__)


def open_images(spec: LoaderSpec, rank: Rank, precision: Precision) -> Loader:
    """Open this rank's part of data whose features are wanted.

    Raises:
        ValueError: the spec leaves something to chance, or it and the data do not fit together.
        FileNotFoundError: there are no such data.
    """
    chance = spec.flip or spec.shuffle or spec.color_jitter.active
    if chance or spec.drop_last or spec.views != "plain":
        raise ValueError(
            "features need every image once, as it is: views plain, no flip, no shuffle and no "
            "drop_last"
        )
    return open_data(spec, rank, RunSettings(precision=precision))


def extract(
    backbone: Backbone,
    loader: Loader,
    rank: Rank,
    *,
    names: Sequence[str],
    precision: Precision,
    cache: Path,
    store: Store = "float32",
) -> Features:
    """Return the features of every sample; all ranks call, and get the same.

    Args:
        backbone: of `backbone.load_frozen_backbone`.
        loader: of `open_images`.
        rank: who computes which part.
        names: stages of the backbone, pooled as `heads.stage_pools` does it, or `AVGPOOL`.
        precision: of the network; pools work in float32.
        cache: folder for the arrays, in one subfolder per backbone and data; on several machines they
            must share it. Where another job writes the same arrays, a single process waits for
            them; several raise, as they would wait for longer than their group may.
        store: type of the arrays.

    Raises:
        ValueError: there is no such stage, the folder cannot be written, is being written by
            another job, or has no space for the arrays.
        RuntimeError: the ranks have other data.
    """
    unknown = [name for name in names if name not in (*backbone.stage_names, AVGPOOL)]
    if unknown or not names:
        known = ", ".join((*backbone.stage_names, AVGPOOL))
        raise ValueError(
            f"{backbone.arch} has no stage {unknown or '(none named)'}: it has {known}"
        )
    check_equal(len(loader), rank, what="steps in an epoch")
    check_equal(int(loader.data_id or "0", 16) >> 1, rank, what="fingerprints of the data")
    about = _about(backbone, loader, precision, store)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache / key
    with contextlib.ExitStack() as held:
        missing = _missing(backbone, loader, rank, names, store, folder, held)
        if missing:
            _compute(backbone, loader, rank, missing, precision, store, folder)
            if rank.main:
                write_json(folder / "features.json", about)
        elif rank.main:
            logger.info("features of %s are in %s already", loader.spec.data, folder)
    if missing:
        barrier(rank)
    if not folder.is_dir():
        raise ValueError(
            f"process {rank.rank} does not see {folder}: the folder for features must lie on a "
            "file system that all machines share"
        )
    return Features(
        {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names},
        np.load(folder / "labels.npy"),
        np.load(folder / "indices.npy"),
        loader.data_id,
        loader.classes,
    )


def _about(
    backbone: Backbone, loader: Loader, precision: Precision, store: Store
) -> dict[str, object]:
    """All that decides the values, but for the engine, which changes pixels by rounding only."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    spec = asdict(loader.spec)
    drawn = {} if spec["max_samples"] is None and loader.data_id else {"seed": spec["seed"]}
    if spec["samples_per_class"] is not None:
        drawn = {"samples_per_class": spec["samples_per_class"], "seed": spec["seed"]}
    result = plain(
        {
            "arch": backbone.arch,
            "weights": digest.hexdigest(),
            "data": loader.data_id or f"synthetic {spec['samples']}",
            **{name: spec[name] for name in ("normalize", "max_samples", "max_undecodable")},
            "crop": {"kind": type(loader.spec.crop).__name__, **spec["crop"]},
            **drawn,
            "precision": precision,
            "store": store,
        }
    )
    assert isinstance(result, dict)
    return result


def _missing(
    backbone: Backbone,
    loader: Loader,
    rank: Rank,
    names: Sequence[str],
    store: Store,
    folder: Path,
    held: contextlib.ExitStack,
) -> list[str]:
    """The stages to compute, the same on all ranks; `held` keeps the folder for their writer.

    The main process looks alone: where others ask for files that are not there yet, a network's
    file system tells them the same again for a while after the files have come.
    """
    said: dict[str, list[str] | str] = {}
    if rank.main:
        try:
            missing = [name for name in names if not (folder / f"{name}.npy").exists()]
            if missing:
                held.enter_context(alone(folder, wait=rank.world == 1))
                # Once more: another job may have written them in the meantime.
                missing = [name for name in missing if not (folder / f"{name}.npy").exists()]
            if missing:
                dims, _ = _pooled(backbone, loader.spec.crop.size)
                width = sum(dims[name] for name in missing) * np.dtype(store).itemsize
                count = len(loader) * loader.spec.batch_size * rank.world
                what = f"{', '.join(missing)} of {count:,} images as {store}"
                check_space(folder, count * (width + 2 * np.dtype(np.int64).itemsize), what=what)
            said["missing"] = missing
        except OSError as error:
            said["error"] = f"cannot write features into {folder}: {error}"
        except ValueError as error:
            said["error"] = str(error)
    said = json.loads(broadcast_str(json.dumps(said), rank))
    if isinstance(found := said.get("missing"), list):
        return found
    raise ValueError(said["error"])


def _pooled(backbone: Backbone, size: int) -> tuple[dict[str, int], dict[str, nn.Module]]:
    """Length of a sample's features, and what pools the maps to them, by name of the stage."""
    names, pools = (*backbone.stage_names, AVGPOOL), stage_pools(backbone, size)
    dims = (*pooled_dims(backbone, size, pools), backbone.dim)
    pools = [*pools, nn.AdaptiveAvgPool2d(1)]
    return dict(zip(names, dims, strict=True)), dict(zip(names, pools, strict=True))


@torch.inference_mode()
def _compute(
    backbone: Backbone,
    loader: Loader,
    rank: Rank,
    names: Sequence[str],
    precision: Precision,
    store: Store,
    folder: Path,
) -> None:
    """Write the arrays of some stages; the main process has the pen."""
    dims, pools = _pooled(backbone, loader.spec.crop.size)
    places = {name: backbone.stage_names.index(name) if name != AVGPOOL else -1 for name in names}
    with contextlib.ExitStack() as stack:
        files: dict[str, Append] = {}
        if rank.main:
            # Files get their names in the opposite order: a stage that is there has its labels.
            files = {
                **{n: stack.enter_context(rows(folder, n, store, dims[n])) for n in names},
                "labels": stack.enter_context(rows(folder, "labels", "int64")),
                "indices": stack.enter_context(rows(folder, "indices", "int64")),
            }
            progress = Progress(f"features of {loader.spec.data}", len(loader))
            stack.enter_context(contextlib.closing(progress))
        last = -1
        for step, batch in enumerate(loader.epoch(0), start=1):
            with autocast(rank.device, precision):
                maps = backbone.stages(batch.images)
            gathered = {
                name: pools[name](maps[place].float()).flatten(1) for name, place in places.items()
            }
            gathered["labels"] = batch.labels
            gathered["indices"] = batch.indices
            gathered = {name: gather_rows(part, rank) for name, part in gathered.items()}
            keep = gather_rows(batch.valid, rank)
            if not rank.main:
                continue
            order = gathered["indices"][keep].cpu().numpy()
            if len(order) and not (np.diff(order, prepend=last) > 0).all():
                raise RuntimeError(f"{loader.engine} gave samples in another order than the index")
            last = int(order[-1]) if len(order) else last
            for name, part in gathered.items():
                files[name](part[keep].cpu().numpy())
            progress.update(step)
