"""Building the probes of a linear evaluation: one set per optimiser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rotpred.models import probes
from rotpred.models.base import Backbone
from rotpred.models.heads import pooled_dims, stage_pools
from rotpred.models.names import AVGPOOL
from rotpred.models.probes import ProbeSet, StageProbe
from rotpred.recipes.linear import Linear
from rotpred.recipes.probe import Probe
from rotpred.training.state import OptimizedPart


@dataclass(frozen=True)
class ProbePart:
    """Probes with one optimiser."""

    probes: ProbeSet
    recipe: Probe
    lr: float

    @property
    def trained(self) -> OptimizedPart:
        return OptimizedPart(
            self.probes, replace(self.recipe.optim, lr=self.lr), self.recipe.schedule
        )


def build_parts(
    recipe: Linear, backbone: Backbone, classes: int, *, cached: Sequence[str]
) -> list[ProbePart]:
    """Build all probes of a recipe, one part per optimiser.

    Args:
        recipe: Names the probes and the size of the crops.
        backbone: The frozen network that the probes read.
        classes: Number of classes.
        cached: Stages with cached features, in their order in a batch; empty if the probes read
            feature maps of all stages.
    """
    size = recipe.val.crop.size if cached else recipe.train.crop.size
    shapes = pooled_shapes(backbone, size, names=cached)
    parts = []
    for probe in recipe.probes:
        for lr in probe.lrs or (probe.optim.lr,):
            made = _build_probes(probe, backbone, classes, size)
            if cached:
                places = [cached.index(one.name) for one in made]
                made = [
                    probes.on_features(one, place, shapes[place])
                    for one, place in zip(made, places, strict=True)
                ]
            if probe.lrs:
                for one in made:
                    one.name = f"{one.name}@{lr:g}"
            parts.append(ProbePart(ProbeSet(made), probe, lr))
    return parts


def _build_probes(probe: Probe, backbone: Backbone, classes: int, size: int) -> list[StageProbe]:
    """Build the classifiers of one `Probe` for images of `size` pixels."""
    match probe.kind:
        case "avgpool":
            return probes.avgpool(backbone, classes)
        case "stages":
            return probes.stages(backbone, classes, size, affine=probe.affine)
        case "conv":
            return probes.conv(backbone, classes)
        case "nonlinear":
            return probes.nonlinear(backbone, classes, size)


def pooled_shapes(
    backbone: Backbone, size: int, *, names: Sequence[str]
) -> list[tuple[int, int, int]]:
    """Return (channels, height, width) of the pooled features of stages, for crops of `size`."""
    known = {AVGPOOL: (backbone.dim, 1, 1)}
    dims = pooled_dims(backbone, size, stage_pools(backbone, size))
    for name, channels, dim in zip(
        backbone.stage_names, backbone.stage_channels, dims, strict=True
    ):
        side = math.isqrt(dim // channels)
        known[name] = (channels, side, side)
    return [known[name] for name in names]
