"""The sources of the published numbers, and what limits a comparison with them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedSource:
    """Source of a column of published numbers."""

    name: str
    """Title of the column."""
    place: str
    """Project and file, network and schedule."""


_ZOO = "OpenSelfSup, docs/MODEL_ZOO.md, ResNet-50"
MM = PublishedSource(
    "mmselfsup",
    "mmselfsup, configs/selfsup/rotation_pred/README.md, ResNet-50, 70 epochs",
)
OSS = PublishedSource("OpenSelfSup", f"{_ZOO}, 70 epochs: the same recipe, its own checkpoint")
OSS_RANDOM = PublishedSource("OpenSelfSup, random", f"{_ZOO}, random weights")
OSS_SUPERVISED = PublishedSource("OpenSelfSup, supervised", f"{_ZOO}, supervised on ImageNet")
OSS_C4 = PublishedSource(
    "OpenSelfSup, C4 2x", f"{_ZOO}; another detector: Mask R-CNN C4, 2x schedule"
)
OSS_C4_RANDOM = PublishedSource(
    "OpenSelfSup, C4 2x, random", f"{_ZOO}, random weights; another detector"
)
OSS_C4_SUPERVISED = PublishedSource(
    "OpenSelfSup, C4 2x, supervised", f"{_ZOO}, supervised on ImageNet; another detector"
)
PAPER = PublishedSource(
    "paper", "Gidaris et al., ICLR 2018, as quoted by later texts (second hand)"
)
RERUN = PublishedSource(
    "rerun of the paper's code", "gidariss/FeatureLearningRotNet, issue 6: a user's report"
)

WARNING = (
    "mmselfsup's table mixes three checkpoints. SVM, low-shot, Feature1 to Feature5, detection and "
    "segmentation are unchanged since v0.5.0, whose loader (up to v0.6.0) fed BGR pixels with the "
    "mean and standard deviation of RGB. v0.7.0 corrected that and retrained (Places205, and kNN "
    "in v0.8.0). The AvgPool number 47.0 is of a third checkpoint, of 1.x (48.12 for that of "
    "February 2022, 44.35 for that of December 2021). Differences of half a point from it are not "
    "meaningful."
)
"""About inconsistencies among the published numbers; derived from the tags of mmselfsup."""
