"""Feature extraction: a frozen backbone over whole data sets, computed once and cached on disk.

Arrays have one row per sample for any number of processes: padding is dropped, and rows are in the
order of the samples' indices. A stage is computed only if the cache lacks it, so that sweeps over
classifiers read files. If several jobs need the same features at once, one computes them.
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

from pipelines.checks import check
from pipelines.loader import Loader
from pipelines.spec import LoaderSpec, Precision
from pipelines.storage import check_space, locked, write_json
from rotpred.distributed import Rank, barrier, check_equal, from_main, gather_rows
from rotpred.features.base import Features, Store
from rotpred.features.npy_writer import Append, npy_writer
from rotpred.models.base import Backbone
from rotpred.models.heads import pooled_dims, stage_pools
from rotpred.models.names import AVGPOOL
from rotpred.records.former_names import restore_names
from rotpred.records.progress import Progress
from rotpred.records.recipe_json import plain
from rotpred.training.data import open_data
from rotpred.training.loader_interface import LabelledLoader
from rotpred.training.precision import autocast

logger = logging.getLogger(__name__)


def open_extraction_loader(spec: LoaderSpec, rank: Rank, precision: Precision) -> Loader:
    """Open this rank's shard of the data whose features are extracted.

    Raises:
        ValueError: The spec has random transforms or drops samples, or does not fit the data.
        FileNotFoundError: There are no such data.
    """
    random = spec.flip or spec.shuffle or spec.color_jitter.active
    if random or spec.drop_last or spec.views != "plain":
        raise ValueError(
            "features need every image once, unchanged: views plain, no flip, no shuffle, no color "
            "jitter and no drop_last"
        )
    return open_data(spec, rank, precision)


def extract(
    backbone: Backbone,
    loader: LabelledLoader,
    rank: Rank,
    *,
    names: Sequence[str],
    precision: Precision,
    cache: Path,
    store: Store = "float32",
) -> Features:
    """Return the features of every sample. All ranks must call; all get the same.

    Args:
        backbone: From `load_frozen_backbone`.
        loader: From `open_extraction_loader`.
        rank: This process.
        names: Stages of the backbone, pooled by `rotpred.models.heads.stage_pools`, or `AVGPOOL`.
        precision: Precision of the network; pooling is in float32.
        cache: Folder for the arrays, with one subfolder per backbone and data. Several machines
            must share it. If another job is writing the same arrays, a job of one process waits for
            them; a job of several raises, because waiting could exceed the group's timeout.
        store: Dtype of the arrays.

    Raises:
        ValueError: There is no such stage, precision or store, or the folder cannot be written, is
            being written by another job, or has no space for the arrays.
        RuntimeError: The ranks have different data.
    """
    check("precision", precision, Precision)
    check("store", store, Store)
    unknown = [name for name in names if name not in (*backbone.stage_names, AVGPOOL)]
    if unknown or not names:
        known = ", ".join((*backbone.stage_names, AVGPOOL))
        raise ValueError(
            f"{backbone.arch} has no stage {unknown or '(none named)'}: it has {known}"
        )
    check_equal(len(loader), rank, what="steps in an epoch")
    check_equal(int(loader.data_id or "0", 16) >> 1, rank, what="fingerprints of the data")
    about = _description(backbone, loader, precision, store)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache / key
    with contextlib.ExitStack() as locks:
        missing = _missing(backbone, loader, rank, names, store, folder, locks)
        if missing:
            _compute(backbone, loader, rank, missing, precision, store, folder)
            if rank.main:
                write_json(folder / "features.json", about)
        elif rank.main:
            logger.info("features of %s: cached in %s", loader.spec.data, folder)
    if missing:
        barrier(rank)
    if not folder.is_dir():
        raise ValueError(
            f"process {rank.rank} does not see {folder}: the folder for features must be on a "
            "file system that all machines share"
        )
    return Features(
        {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names},
        np.load(folder / "labels.npy"),
        np.load(folder / "indices.npy"),
        loader.data_id,
        loader.classes,
    )


def _description(
    backbone: Backbone, loader: LabelledLoader, precision: Precision, store: Store
) -> dict[str, object]:
    """Return everything that determines the features. The engine only affects rounding."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    spec = asdict(loader.spec)
    sampling = {} if spec["max_samples"] is None and loader.data_id else {"seed": spec["seed"]}
    if spec["samples_per_class"] is not None:
        sampling = {"samples_per_class": spec["samples_per_class"], "seed": spec["seed"]}
    result = plain(
        {
            "arch": backbone.arch,
            "weights": digest.hexdigest(),
            "data": loader.data_id or f"synthetic {spec['samples']}",
            **{name: spec[name] for name in ("normalize", "max_samples", "max_undecodable")},
            "crop": {"kind": type(loader.spec.crop).__name__, **spec["crop"]},
            **sampling,
            "precision": precision,
            "store": store,
        }
    )
    # Arrays of version 0.1 are found again: up to 226 GB, and hours of work.
    description: dict[str, object] = restore_names(result)
    return description


def _missing(
    backbone: Backbone,
    loader: LabelledLoader,
    rank: Rank,
    names: Sequence[str],
    store: Store,
    folder: Path,
    locks: contextlib.ExitStack,
) -> list[str]:
    """Return the stages to compute, the same on all ranks; `locks` then holds the folder's lock.

    Only rank 0 looks for files. A network file system caches that a file is missing, so that a rank
    that looked too early would not see the file for a while after it was written.

    Raises:
        ValueError: The folder cannot be written, is locked, or has no space.
    """

    def look() -> list[str]:
        try:
            missing = [name for name in names if not (folder / f"{name}.npy").exists()]
            if missing:
                folder.mkdir(parents=True, exist_ok=True)
                hint = "a job of several processes does not wait: start it again when that is done"
                locks.enter_context(locked(folder, hint=hint, wait=rank.world == 1))
                # Look again: another job may have written them while this one waited.
                missing = [name for name in missing if not (folder / f"{name}.npy").exists()]
            if missing:
                dims, _ = _pooled(backbone, loader.spec.crop.size)
                width = sum(dims[name] for name in missing) * np.dtype(store).itemsize
                count = len(loader) * loader.spec.batch_size * rank.world
                what = f"{', '.join(missing)} of {count:,} images as {store}"
                check_space(folder, count * (width + 2 * np.dtype(np.int64).itemsize), what=what)
        except OSError as error:
            raise ValueError(f"cannot write features into {folder}: {error}") from error
        return missing

    return from_main(look, rank)


def _pooled(backbone: Backbone, size: int) -> tuple[dict[str, int], dict[str, nn.Module]]:
    """Return by stage: length D of a sample's features, and the module that pools a feature map."""
    names, pools = (*backbone.stage_names, AVGPOOL), stage_pools(backbone, size)
    dims = (*pooled_dims(backbone, size, pools), backbone.dim)
    pools = [*pools, nn.AdaptiveAvgPool2d(1)]
    return dict(zip(names, dims, strict=True)), dict(zip(names, pools, strict=True))


@torch.inference_mode()
def _compute(
    backbone: Backbone,
    loader: LabelledLoader,
    rank: Rank,
    names: Sequence[str],
    precision: Precision,
    store: Store,
    folder: Path,
) -> None:
    """Extract the given stages. All ranks compute; rank 0 alone writes."""
    dims, pools = _pooled(backbone, loader.spec.crop.size)
    positions = {
        name: backbone.stage_names.index(name) if name != AVGPOOL else -1 for name in names
    }
    with contextlib.ExitStack() as stack:
        files: dict[str, Append] = {}
        if rank.main:
            # Files are renamed in reverse order, so that a stage that exists has its labels.
            files = {
                **{n: stack.enter_context(npy_writer(folder, n, store, dims[n])) for n in names},
                "labels": stack.enter_context(npy_writer(folder, "labels", "int64")),
                "indices": stack.enter_context(npy_writer(folder, "indices", "int64")),
            }
            progress = Progress(f"features of {loader.spec.data}", len(loader))
            stack.enter_context(contextlib.closing(progress))
        last = -1
        for step, batch in enumerate(loader.epoch(0), start=1):
            with autocast(rank.device, precision):
                feature_maps = backbone.stages(batch.images)
            gathered = {
                name: pools[name](feature_maps[i].float()).flatten(1)
                for name, i in positions.items()
            }
            gathered["labels"] = batch.labels
            gathered["indices"] = batch.indices
            gathered = {name: gather_rows(part, rank) for name, part in gathered.items()}
            keep = gather_rows(batch.valid, rank)
            if not rank.main:
                continue
            order = gathered["indices"][keep].cpu().numpy()
            if len(order) and not (np.diff(order, prepend=last) > 0).all():
                raise RuntimeError(
                    f"{loader.engine} returned samples in another order than the index"
                )
            last = int(order[-1]) if len(order) else last
            for name, part in gathered.items():
                files[name](part[keep].cpu().numpy())
            progress.update(step)
