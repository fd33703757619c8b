"""Classifiers on the maps of a frozen backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from rotpred.models.base import Backbone
from rotpred.models.heads import pooled_dims, stage_pools, stage_shapes

_HIDDEN = 192  # width of the authors' conv probe (architectures/NonLinearClassifier.py)


def _linear(dim: int, classes: int) -> nn.Linear:
    """N(0, 0.01) and zero bias, as mmselfsup's ClsHead."""
    layer = nn.Linear(dim, classes)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class StageProbe(nn.Module):
    """A classifier that reads the map of one stage."""

    def __init__(self, name: str, stage: int, layers: nn.Module) -> None:
        super().__init__()
        self.name, self.stage, self.layers = name, stage, layers

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """All stages' maps to logits (N, classes)."""
        logits: torch.Tensor = self.layers(maps[self.stage].float())
        return logits


class ProbeSet(nn.ModuleList):
    """Classifiers side by side; one forward pass gives the logits of all."""

    @property
    def names(self) -> list[str]:
        """What results call the probes, in order."""
        return [str(probe.name) for probe in self]

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All stages' maps to one (N, classes) per probe."""
        return [probe(maps) for probe in self]


def avgpool(backbone: Backbone, classes: int) -> list[StageProbe]:
    """Linear on the global average of the last map (MoCo main_lincls.py; mmselfsup)."""
    layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), _linear(backbone.dim, classes))
    return [StageProbe("avgpool", len(backbone.stage_names) - 1, layers)]


def on_features(probe: StageProbe, place: int, shape: tuple[int, int, int]) -> StageProbe:
    """The same classifier, which reads pooled features where it read maps and pooled them.

    Args:
        probe: of `avgpool` or `stages`; its layers after the pool are shared.
        place: index of its features in what `forward` is given.
        shape: channels, height and width of its pooled map; (N, C * H * W) lies flat.
    """
    assert isinstance(probe.layers, nn.Sequential)
    _pool, *rest = probe.layers
    return StageProbe(probe.name, place, nn.Sequential(nn.Unflatten(1, shape), *rest))


def stages(
    backbone: Backbone, classes: int, input_size: int, *, affine: bool = False
) -> list[StageProbe]:
    """Pool, batch norm (by default without affine parameters), Linear, on every stage.

    Source: mmselfsup mmselfsup/models/utils/multi_pooling.py and its mhead configs; with affine
    parameters as VISSL's vissl/models/heads/linear_eval_mlp.py. Pools that fit the table only at
    224 pixels are replaced by adaptive ones elsewhere (`heads.stage_pools`).
    """
    pools = stage_pools(backbone, input_size)
    dims = pooled_dims(backbone, input_size, pools)
    return [
        StageProbe(
            name,
            i,
            nn.Sequential(
                pools[i],
                nn.BatchNorm2d(backbone.stage_channels[i], affine=affine),
                nn.Flatten(),
                _linear(dims[i], classes),
            ),
        )
        for i, name in enumerate(backbone.stage_names)
    ]


def _as_authors(layers: nn.Sequential) -> nn.Sequential:
    """Their initialisation: N(0, sqrt(2 / fan)) by what a layer puts out, biases zero.

    Source: gidariss/FeatureLearningRotNet, architectures/NonLinearClassifier.py, `initilize`. Batch
    norm hides the scale of a weight from the output, but not from its learning rate: torch's
    default weights of a layer with 12,288 inputs are twenty times smaller.
    """
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            fan = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
        elif isinstance(layer, nn.Linear):
            fan = layer.out_features
        else:
            continue
        nn.init.normal_(layer.weight, std=math.sqrt(2 / fan))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return layers


def conv(backbone: Backbone, classes: int) -> list[StageProbe]:
    """Three convolutions (3x3, 1x1, 1x1; 192), global average, Linear, on every stage.

    Source: gidariss/FeatureLearningRotNet, architectures/NonLinearClassifier.py.
    """

    def unit(channels: int, size: int) -> list[nn.Module]:
        layer = nn.Conv2d(channels, _HIDDEN, size, padding=size // 2, bias=False)
        return [layer, nn.BatchNorm2d(_HIDDEN), nn.ReLU(inplace=True)]

    return [
        StageProbe(
            f"{name}/conv",
            i,
            _as_authors(
                nn.Sequential(
                    *unit(backbone.stage_channels[i], 3),
                    *unit(_HIDDEN, 1),
                    *unit(_HIDDEN, 1),
                    nn.AdaptiveAvgPool2d(1),
                    nn.Flatten(),
                    nn.Linear(_HIDDEN, classes),
                )
            ),
        )
        for i, name in enumerate(backbone.stage_names)
    ]


def nonlinear(backbone: Backbone, classes: int, input_size: int) -> list[StageProbe]:
    """Two hidden layers of min(20 * classes, 2048) on the flat map of every stage.

    Source: gidariss/FeatureLearningRotNet, architectures/NonLinearClassifier.py: hidden layers
    without bias, each with batch norm and ReLU.
    """
    width = min(20 * classes, 2048)

    def unit(inputs: int) -> list[nn.Module]:
        layers = (nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width))
        return [*layers, nn.ReLU(inplace=True)]

    return [
        StageProbe(
            f"{name}/nonlinear",
            i,
            _as_authors(
                nn.Sequential(
                    nn.Flatten(),
                    *unit(channels * height * width_),
                    *unit(width),
                    nn.Linear(width, classes),
                )
            ),
        )
        for i, (name, (channels, height, width_)) in enumerate(
            zip(backbone.stage_names, stage_shapes(backbone, input_size), strict=True)
        )
    ]
