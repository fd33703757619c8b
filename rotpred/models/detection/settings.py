"""Settings of the detectors that recipes choose: anchors, numbers of proposals, box head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BoxHead = Literal["4conv1fc", "2fc"]


@dataclass(frozen=True)
class Proposals:
    """Anchors and numbers of proposals. Pairs are for training and evaluation."""

    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Anchor sizes in pixels: all of them at every position of res4, or one per FPN level."""
    before: tuple[int, int] = (12000, 6000)
    """Proposals per feature map before non-maximum suppression (training, evaluation)."""
    after: tuple[int, int] = (2000, 1000)
    """Proposals per image after non-maximum suppression (training, evaluation)."""
    rois: int = 512
    """Proposals per image that the box head is trained on."""
    pooled: int = 14
    """Side of the RoIAlign output before res5, or before the mask head; half of it before the box
    head with FPN. Masks have twice this side."""

    def __post_init__(self) -> None:
        if not self.anchors or min(self.anchors) < 1:
            raise ValueError(f"proposals.anchors must be positive sides, got {self.anchors}")
        if min(*self.before, *self.after, self.rois) < 1:
            raise ValueError(
                "proposals.before, after and rois must be at least 1, got "
                f"{self.before}, {self.after} and {self.rois}"
            )
        if self.pooled < 2 or self.pooled % 2:
            raise ValueError(f"proposals.pooled must be even, at least 2, got {self.pooled}")


C4 = Proposals()
"""Of Faster R-CNN C4."""

FPN = Proposals(before=(2000, 1000), after=(1000, 1000))
"""Of Mask R-CNN with FPN."""
