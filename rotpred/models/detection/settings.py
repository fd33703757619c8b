"""Settings of the detectors that recipes choose: anchors, numbers of proposals, box head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pipelines.checks import EVEN, NOT_EMPTY, Checked, PositiveInt, at_least

BoxHead = Literal["4conv1fc", "2fc"]


@dataclass(frozen=True)
class Proposals(Checked):
    """Anchors and numbers of proposals. Pairs are for training and evaluation."""

    anchors: Annotated[tuple[PositiveInt, ...], NOT_EMPTY] = (32, 64, 128, 256, 512)
    """Anchor sizes in pixels: all of them at every position of res4, or one per FPN level."""
    before: tuple[PositiveInt, PositiveInt] = (12000, 6000)
    """Proposals per feature map before non-maximum suppression (training, evaluation)."""
    after: tuple[PositiveInt, PositiveInt] = (2000, 1000)
    """Proposals per image after non-maximum suppression (training, evaluation)."""
    rois: PositiveInt = 512
    """Proposals per image that the box head is trained on."""
    pooled: Annotated[int, at_least(2), EVEN] = 14
    """Side of the RoIAlign output before res5, or before the mask head; half of it before the box
    head with FPN. Masks have twice this side."""


C4 = Proposals()
"""Of Faster R-CNN C4."""

FPN = Proposals(before=(2000, 1000), after=(1000, 1000))
"""Of Mask R-CNN with FPN."""
