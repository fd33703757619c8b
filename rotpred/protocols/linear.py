"""Linear evaluation: probes on a frozen backbone, all trained in one pass."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from pipelines.batch import Batch
from pipelines.loader import Loader
from pipelines.spec import LoaderSpec, Precision
from rotpred.distributed import Rank
from rotpred.features.extract import open_extraction_loader
from rotpred.features.loader import FeatureLoader
from rotpred.models.names import AVGPOOL
from rotpred.models.probes import ProbeSet
from rotpred.protocols.classes import number_of_classes
from rotpred.protocols.features import extract_both
from rotpred.protocols.probe_parts import ProbePart, build_parts, pooled_shapes
from rotpred.protocols.run import Opener, Run, open_run
from rotpred.protocols.scoring import TOPS, Validation, score
from rotpred.recipes.linear import Linear
from rotpred.training.data import check_views, open_data
from rotpred.training.loader_interface import LabelledLoader
from rotpred.training.precision import autocast
from rotpred.training.state import LossAndLogs
from rotpred.training.sync_bn import convert_sync_bn

logger = logging.getLogger(__name__)

CACHED = "features of the validation crop, no augmentation"
"""Value of `protocol` in the results of probes that were trained on cached features."""

# Fields of the training spec that select and read samples. A cache takes the rest from the
# validation spec.
_DATA_FIELDS = (
    "data",
    "root",
    "engine",
    "max_samples",
    "samples_per_class",
    "seed",
    "max_undecodable",
    "samples",
    "workers",
)

Reader = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""Maps a batch to the inputs of the probes: feature maps of all stages, or cached features."""


def run(recipe: Linear, rank: Rank) -> Path:
    """Train the probes, compute exact top-1 and top-5 on the validation set, write the run folder.

    Returns:
        The run folder; results.json has one row per probe and metric.

    Raises:
        ValueError: The weights, data and recipe do not fit together.
        Stopped: A signal ended the run after a checkpoint.
    """
    check_views("plain", recipe.train, recipe.val)
    if recipe.cache and not {probe.kind for probe in recipe.probes} <= {"avgpool", "stages"}:
        raise ValueError("cache works with probes of kind avgpool and stages only")
    if recipe.store != "float32" and not recipe.cache:
        raise ValueError(f"store {recipe.store} needs a cache: pass --cache FOLDER")

    def open_unaugmented(spec: LoaderSpec, rank: Rank, precision: Precision) -> Loader:
        own = {name: getattr(spec, name) for name in _DATA_FIELDS}
        return open_extraction_loader(replace(recipe.val, **own), rank, precision)

    opener: Opener[LabelledLoader] = open_unaugmented if recipe.cache else open_data
    with open_run(recipe, rank, opener) as run:
        classes = number_of_classes(run.train, run.val)
        names = _train_on_features(recipe, run, recipe.cache) if recipe.cache else ()
        parts = build_parts(recipe, run.backbone, classes, cached=names)
        heads = ProbeSet(probe for part in parts for probe in part.probes).to(rank.device)
        if len(set(heads.names)) < len(heads):
            raise ValueError(f"two probes have the same name: {', '.join(heads.names)}")
        # In place: the optimisers hold the StageProbes.
        convert_sync_bn(heads, recipe.sync_bn, rank, recipe.run)
        state = run.train_state(
            heads,
            [part.trained for part in parts],
            probes=[asdict(probe) for probe in recipe.probes],
            **({"features": names} if names else {}),
            **({"store": recipe.store} if recipe.store != "float32" else {}),
        )
        if run.resume(state):
            logger.info(
                "%s: %d probes on %s (%s), engine %s, %d classes, %d steps",
                recipe.name, len(heads), recipe.backbone, recipe.weights, run.train.engine,
                classes, run.total,
            )  # fmt: skip
            read = _reader(recipe, run, names, compiled=recipe.run.compile)
            read_val = _reader(recipe, run, names)

            def objective(batch: Batch) -> LossAndLogs:
                inputs, targets = read(batch.images), batch.targets
                # Probes compute in fp32: bf16 logits of a thousand classes tie too often to be
                # ranked.
                losses = [cross_entropy(logits, targets) for logits in state.model(inputs)]
                # Probes share no parameters: the gradient of the sum is each one's own gradient.
                loss = torch.stack(losses)
                return loss.sum(), {"loss": loss.mean()}

            def evaluate() -> Validation:
                return score(run.val, rank, heads.names, lambda images: heads(read_val(images)))

            found = run.fit(
                state,
                objective,
                evaluate,
            )
            assert found is not None
            _write_results(recipe, run, parts, found)
    return run.out


def _train_on_features(recipe: Linear, run: Run[LabelledLoader], cache: str) -> tuple[str, ...]:
    """Replace the run's images by their features in `cache`; return the stages in their order."""
    kinds = {probe.kind for probe in recipe.probes}
    names = run.backbone.stage_names if "stages" in kinds else ()
    names = (*names, AVGPOOL) if "avgpool" in kinds else names
    train, val = run.train.spec, run.val.spec
    size = recipe.train.batch_size
    specs = (replace(train, batch_size=size, shuffle=True, drop_last=True), val)
    features = extract_both(run, names, cache=cache, store=recipe.store)
    run.train, run.val = (
        FeatureLoader(part, spec, names=names, rank=run.rank)
        for part, spec in zip(features, specs, strict=True)
    )
    return names


def _reader(
    recipe: Linear, run: Run[LabelledLoader], names: Sequence[str], *, compiled: bool = False
) -> Reader:
    if names:
        shapes = pooled_shapes(run.backbone, recipe.val.crop.size, names=names)
        dims = [math.prod(shape) for shape in shapes]
        return lambda images: torch.split(images, dims, dim=1)
    stages = run.backbone.stages
    if compiled:
        stages = torch.compile(stages, dynamic=False)

    def read(images: torch.Tensor) -> Sequence[torch.Tensor]:
        with autocast(run.rank.device, recipe.run.precision), torch.no_grad():
            return stages(images)

    return read


def _write_results(
    recipe: Linear, run: Run[LabelledLoader], parts: list[ProbePart], found: Validation
) -> None:
    own: dict[str, Any] = {}
    if recipe.cache:
        half = recipe.store != "float32"
        own["protocol"] = f"{CACHED}, stored as {recipe.store}" if half else CACHED

    def results(name: str, probe: str, **extra: Any) -> None:
        for top in TOPS:
            if (value := found.results.get(f"{top}/{probe}")) is not None:
                run.result(f"{top}/{name}", value, n=found.n, **own, **extra)

    sweeps: dict[str, list[tuple[float, str]]] = {}
    for part in parts:
        for name in part.probes.names:
            if part.recipe.lrs:
                sweeps.setdefault(name.rpartition("@")[0], []).append((part.lr, name))
            else:
                results(name, name)
    for base, candidates in sweeps.items():
        best_lr, best = max(candidates, key=lambda one: found.results[f"top1/{one[1]}"])
        for lr, name in candidates:
            results(name, name, lr=lr, best=name == best)
        results(base, best, lr=best_lr, chosen_from=len(candidates), chosen_on="val")
