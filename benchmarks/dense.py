"""Detection and segmentation: loader alone, step alone, both together.

    python benchmarks/dense.py --recipes voc0712_det --output dense.jsonl

Uses photographs with synthetic annotations, in the layout of each data set. On a GPU the recipes
run at full size; on a CPU at a quarter of it, with a small network.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from data import annotated_scenes
from harness.overlap import BOTH, measure_overlap
from harness.results import Row, TimingOptions, against, image_row, publish, run_program
from harness.timing import Window, memory_mib
from pipelines.dense.batch import DenseBatch
from pipelines.dense.loader import DenseLoader, open_dense
from pipelines.dense.spec import DenseSpec, RatioCrop, ShortSide
from rotpred.distributed import Rank
from rotpred.models.backbone import build_backbone
from rotpred.models.detection.settings import Proposals
from rotpred.models.memory_format import channels_last
from rotpred.protocols.dense import Task
from rotpred.protocols.detection import DetectionTask
from rotpred.protocols.segmentation import SegmentationTask
from rotpred.recipes import detection, segmentation
from rotpred.recipes.detection import Detection
from rotpred.training.state import LossAndLogs, OptimizedPart, TrainState

ON_GPU = torch.cuda.is_available()
Name = Literal["voc0712_det", "coco_det", "voc12aug_seg", "cityscapes_seg"]
COLUMNS = ("cpu_seconds_per_1k_images", "wait_share", "peak_mib", "target", "met")
DATA: dict[str, tuple[str, Callable[[Path, int], Path]]] = {
    "voc0712_det": ("voc:2007/trainval", annotated_scenes.voc),
    "coco_det": ("coco:train2017", annotated_scenes.coco),
    "voc12aug_seg": ("vocseg:2012/train", annotated_scenes.voc_masks),
    "cityscapes_seg": ("cityscapes:train", annotated_scenes.cityscapes),
}
"""Data of each recipe, and the function that makes them."""
RECIPES = {**detection.RECIPES, **segmentation.RECIPES}
RESIDENT = 4
"""Batches that the step alone cycles through, because their shapes differ."""
MOST_WAIT = 0.1
"""Largest share of the time that training may wait for its loader."""


@dataclass(frozen=True)
class Arguments(TimingOptions):
    """Training steps of detection and segmentation against their loaders."""

    recipes: tuple[Name, ...] = ("voc0712_det", "coco_det", "voc12aug_seg", "cityscapes_seg")
    """Recipes to measure."""
    backbone: str = "resnet50" if ON_GPU else "resnet18"
    """Replaces the recipes' backbone."""
    scale: float = 1.0 if ON_GPU else 0.25
    """Factor on the recipes' image sizes; numbers of proposals are scaled by its square."""
    batch_size: int | None = None if ON_GPU else 2
    """Images per step; None: as in the recipe."""
    count: int = 48
    """Photographs to generate."""
    workers: int = 0
    """Loading threads; 0: one per allowed core."""
    device: str = "cuda" if ON_GPU else "cpu"
    """The device to train on."""


def main(args: Arguments) -> None:
    """Measure and publish. User errors raise `ValueError` or `OSError`."""
    rows: list[Row] = []
    for name in args.recipes:
        with tempfile.TemporaryDirectory() as folder:
            data, make = DATA[name]
            rows += _task(name, data, make(Path(folder), args.count), args)
    publish(rows, args.output, COLUMNS)


def _task(name: str, data: str, root: Path, args: Arguments) -> list[Row]:
    device = torch.device(args.device)
    full: Any = RECIPES[name]()
    spec = replace(
        full.train,
        root=str(root),
        data=data,
        geometry=_scaled(full.train.geometry, args.scale),
        batch_size=args.batch_size or full.train.batch_size,
        workers=args.workers,
    )
    recipe = replace(full, train=spec, backbone=args.backbone, sync_bn="off")
    if isinstance(recipe, Detection):
        recipe = replace(recipe, proposals=_fewer(recipe.proposals, args.scale**2))
    windows, facts = _measure(recipe, args, device)
    variant = f"{name} {args.backbone}, sizes x {args.scale:g}, batch {spec.batch_size}"
    variant += f" {recipe.run.precision}"
    rows = [
        image_row(
            "dense", contestant, variant, windows[contestant], views=1,
            threads=torch.get_num_threads(), device=device, **facts.get(contestant, {}),
        )
        for contestant in windows
    ]  # fmt: skip
    both = rows[-1]
    both |= against(both["wait_share"], MOST_WAIT, "lower")
    return rows


def _measure(
    recipe: Any, args: Arguments, device: torch.device
) -> tuple[dict[str, list[Window]], dict[str, dict[str, float]]]:
    task: Task = (DetectionTask if isinstance(recipe, Detection) else SegmentationTask)(recipe)
    spec: DenseSpec = recipe.train
    with open_dense(spec, device=device, precision=recipe.run.precision) as loader:
        state, learn = _state(recipe, task, loader, device)
        with closing(loader.epoch(0)) as batches:
            resident = list(islice(batches, RESIDENT))

        def train(batches: Iterator[DenseBatch]) -> Iterator[int]:
            for batch in batches:
                state.begin_step(0.0)
                state.train_step(learn, batch)
                state.step += 1
                yield len(batch.indices)

        for _ in islice(train(cycle(resident)), 2 * RESIDENT):
            pass  # Warm-up: cuDNN chooses kernels, torch allocates memory.
        windows, waits = measure_overlap(loader, train, resident, options=args, device=device)
    peak = memory_mib()["peak_rss_mib"]
    if device.type == "cuda":
        peak = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return windows, {BOTH: {"wait_share": round(median(waits[BOTH]), 4), "peak_mib": peak}}


def _state(
    recipe: Any, task: Task, loader: DenseLoader, device: torch.device
) -> tuple[TrainState, Callable[[DenseBatch], LossAndLogs]]:
    module = task.network(build_backbone(recipe.backbone), len(loader.classes))
    module = channels_last(module, device).train()
    # At this rate no network diverges, whatever the batch size.
    optim = replace(recipe.optim, lr=1e-4, reference_batch=None)
    state = TrainState(
        module,
        [OptimizedPart(module, optim, recipe.schedule)],
        rank=Rank(device=device),
        run=recipe.run,
        folder=Path(),
        global_batch=recipe.train.batch_size,
        identity={"backbone": recipe.backbone},
    )
    return state, lambda batch: task.objective(state, batch)


def _fewer(proposals: Proposals, share: float) -> Proposals:
    def pair(numbers: tuple[int, int]) -> tuple[int, int]:
        return max(1, round(numbers[0] * share)), max(1, round(numbers[1] * share))

    return replace(
        proposals,
        before=pair(proposals.before),
        after=pair(proposals.after),
        rois=max(1, round(proposals.rois * share)),
    )


def _scaled(geometry: Any, scale: float) -> Any:
    def side(length: int) -> int:
        return max(32, round(length * scale))

    match geometry:
        case ShortSide():
            lengths = tuple(side(length) for length in geometry.lengths)
            return replace(geometry, lengths=lengths, longest=side(geometry.longest))
        case RatioCrop():
            sides = {n: side(getattr(geometry, n)) for n in ("size", "long", "short")}
            return replace(geometry, **sides)
    raise TypeError(f"not a training geometry: {geometry}")


if __name__ == "__main__":
    run_program(main, Arguments, "dense")
