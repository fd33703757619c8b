"""Probes: classifiers on the feature maps of a frozen backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from rotpred.models.base import Backbone
from rotpred.models.heads import pooled_dims, stage_pools, stage_shapes

_HIDDEN = 192  # width of the authors' conv probe (architectures/NonLinearClassifier.py)


def _linear(dim: int, classes: int) -> nn.Linear:
    """Linear layer initialised with N(0, 0.01) and zero bias, as mmselfsup's ClsHead."""
    layer = nn.Linear(dim, classes)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class StageProbe(nn.Module):
    """A classifier on the feature map of one stage."""

    def __init__(self, name: str, stage: int, layers: nn.Module) -> None:
        super().__init__()
        self.name, self.stage, self.layers = name, stage, layers

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Map all stages' feature maps, each (N, C, H, W), to logits (N, classes)."""
        logits: torch.Tensor = self.layers(features[self.stage].float())
        return logits


class ProbeSet(nn.ModuleList):
    """Independent probes; one forward pass returns the logits of all."""

    @property
    def names(self) -> list[str]:
        """The probes' names in results, in order."""
        return [str(probe.name) for probe in self]

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Map all stages' feature maps to logits (N, classes), one tensor per probe."""
        return [probe(features) for probe in self]


def avgpool(backbone: Backbone, classes: int) -> list[StageProbe]:
    """Build Linear on the global average of the last stage (MoCo main_lincls.py; mmselfsup)."""
    layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), _linear(backbone.dim, classes))
    return [StageProbe("avgpool", len(backbone.stage_names) - 1, layers)]


def on_features(probe: StageProbe, index: int, shape: tuple[int, int, int]) -> StageProbe:
    """Return the same classifier for features that are already pooled.

    Args:
        probe: From `avgpool` or `stages`; its layers after the pool are shared.
        index: Index of the features in the argument of `forward`.
        shape: Channels, height and width of the pooled feature map, which is given as
            (N, C * H * W).
    """
    assert isinstance(probe.layers, nn.Sequential)
    _pool, *rest = probe.layers
    return StageProbe(probe.name, index, nn.Sequential(nn.Unflatten(1, shape), *rest))


def stages(
    backbone: Backbone, classes: int, input_size: int, *, affine: bool = False
) -> list[StageProbe]:
    """Build pool, batch norm and Linear on every stage.

    Source: mmselfsup mmselfsup/models/utils/multi_pooling.py and its mhead configs. With `affine`
    batch norm has affine parameters, as in VISSL's vissl/models/heads/linear_eval_mlp.py. The table
    of pools is for 224 pixels; other sizes use adaptive pools (`heads.stage_pools`).
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


def _init_as_authors(layers: nn.Sequential) -> nn.Sequential:
    """Initialise weights with N(0, sqrt(2 / fan out)) and biases with zero, in place.

    Source: gidariss/FeatureLearningRotNet, architectures/NonLinearClassifier.py, `initilize`.
    Before batch norm the scale of a weight does not change the output, only the effective learning
    rate: torch's default weights of a layer with 12,288 inputs are twenty times smaller.
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
    """Build three convolutions (3x3, 1x1, 1x1; 192), global average and Linear on every stage.

    Source: gidariss/FeatureLearningRotNet, architectures/NonLinearClassifier.py.
    """

    def unit(channels: int, size: int) -> list[nn.Module]:
        layer = nn.Conv2d(channels, _HIDDEN, size, padding=size // 2, bias=False)
        return [layer, nn.BatchNorm2d(_HIDDEN), nn.ReLU(inplace=True)]

    return [
        StageProbe(
            f"{name}/conv",
            i,
            _init_as_authors(
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
    """Build two hidden layers of min(20 * classes, 2048) on the flat feature map of every stage.

    Source: gidariss/FeatureLearningRotNet, architectures/NonLinearClassifier.py. The hidden layers
    have no bias; each is followed by batch norm and ReLU.
    """
    width = min(20 * classes, 2048)

    def unit(inputs: int) -> list[nn.Module]:
        layers = (nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width))
        return [*layers, nn.ReLU(inplace=True)]

    return [
        StageProbe(
            f"{name}/nonlinear",
            i,
            _init_as_authors(
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
