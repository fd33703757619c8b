"""The tables of the model page: which results fill each cell, and the published numbers.

Numbers are text, as they were printed: 47.0 is not 47.00. A new benchmark is a new
`BenchmarkTable` here.
"""

from __future__ import annotations

from collections.abc import Mapping

from rotpred.report.tables import (
    MM,
    OSS,
    OSS_C4,
    OSS_C4_RANDOM,
    OSS_C4_SUPERVISED,
    OSS_RANDOM,
    OSS_SUPERVISED,
    PAPER,
    RERUN,
    BenchmarkTable,
    Cell,
    PublishedSource,
    cells,
)

__all__ = ["OTHERS", "PRETEXT", "TABLES", "TITLES"]

_STAGES = ("stem", "res2", "res3", "res4", "res5")
_FEATURES = tuple(f"Feature{i} ({stage})" for i, stage in enumerate(_STAGES, start=1))
_SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
_TOP1 = tuple(f"top1/{stage}" for stage in _STAGES)

_OLDEST = (
    "mmselfsup's numbers here are those of its December 2021 checkpoint, trained on BGR pixels."
)
_FEBRUARY = "mmselfsup's numbers here appeared with its February 2022 checkpoint or later."

_SVM = BenchmarkTable(
    "VOC07 classification, linear SVM (mAP)",
    ("voc07_svm",),
    (
        Cell(
            "best of Feature1-5",
            tuple(f"mAP/{stage}" for stage in _STAGES),
            {MM: "67.70", OSS: "67.38", OSS_RANDOM: "30.54", OSS_SUPERVISED: "87.17"},
        ),
        *cells(_FEATURES, (f"mAP/{stage}" for stage in _STAGES), {}),
        Cell("AvgPool", ("mAP/avgpool",)),
        Cell("best of Feature1-5, 11-point AP", tuple(f"mAP11/{stage}" for stage in _STAGES)),
        *cells(
            [f"{name}, 11-point AP" for name in _FEATURES],
            (f"mAP11/{stage}" for stage in _STAGES),
            {},
        ),
        Cell("AvgPool, 11-point AP", ("mAP11/avgpool",)),
    ),
    (
        "The published number is that of the best stage: Feature4 (mmselfsup, OpenSelfSup), "
        "Feature2 (random), Feature5 (supervised), with the AP that VOC uses since 2010.",
        _OLDEST,
    ),
)

_LOW_SHOT = BenchmarkTable(
    "VOC07 classification, low-shot SVM (mAP, mean ± deviation over the draws)",
    ("voc07_lowshot",),
    (
        *cells(
            [f"Feature4 (res4), k = {k}" for k in _SHOTS],
            [f"mAP/res4/k={k}" for k in _SHOTS],
            {
                MM: "20.60 24.35 31.41 39.17 46.56 53.37 59.14 62.42",
                OSS: "18.91 23.33 30.57 38.22 45.83 52.23 58.08 61.11",
                OSS_RANDOM: "9.15 9.39 11.09 12.3 14.3 17.41 21.32 23.77",
                OSS_SUPERVISED: "52.99 63.55 73.7 78.79 81.76 83.75 85.18 85.97",
            },
        ),
        *cells(
            [f"Feature5 (res5), k = {k}" for k in _SHOTS], [f"mAP/res5/k={k}" for k in _SHOTS], {}
        ),
    ),
    (
        "The published rows are shown beside res4, the best stage of the full SVM for rotation "
        "prediction. Random and supervised weights have another best stage.",
        "The cost is chosen on the test data, as published.",
        _OLDEST,
    ),
)

_LINEAR = BenchmarkTable(
    "ImageNet-1k, linear classifiers (top-1)",
    ("in1k_linear", "in1k_mhead"),
    (
        *cells(
            (*_FEATURES, "AvgPool"),
            (*_TOP1, "top1/avgpool"),
            {
                MM: "12.15 31.99 44.57 54.20 45.94 47.0",
                OSS: "12.89 34.30 44.91 54.99 49.09 47.01",
                OSS_RANDOM: "11.37 16.21 13.47 9.07 6.54 4.35",
                OSS_SUPERVISED: "15.18 33.96 47.86 67.56 76.17 74.12",
            },
        ),
    ),
    (
        f"Feature1-5: {_OLDEST} AvgPool: the 1.x checkpoint.",
        "VISSL does not name the layer of its 48.2 (ResNet-50, 105 epochs): see the other "
        "published numbers.",
    ),
    processes=8,
)

_INAT = BenchmarkTable(
    "iNaturalist 2018, linear classifiers (top-1)",
    ("inat18_mhead",),
    cells(_FEATURES, _TOP1, {}),
    ("No results of rotation prediction are published.",),
    processes=8,
)

_PLACES = BenchmarkTable(
    "Places205, linear classifiers (top-1)",
    ("places205_mhead",),
    cells(
        _FEATURES,
        _TOP1,
        {
            MM: "18.94 34.72 44.53 46.30 44.12",
            OSS: "18.65 35.71 42.28 45.98 43.72",
            OSS_RANDOM: "17.19 21.70 19.23 14.59 11.73",
            OSS_SUPERVISED: "21.27 36.10 43.03 51.38 53.05",
        },
    ),
    (_FEBRUARY,),
    processes=8,
)


def _semi(percent: int, published: Mapping[PublishedSource, str]) -> tuple[Cell, ...]:
    names = (f"{percent} %, top-1", f"{percent} %, top-5")
    return cells(names, ("top1", "top5"), published, {"fraction": percent / 100})


_SEMI = BenchmarkTable(
    "ImageNet-1k, semi-supervised: fine-tuning on 1 % and 10 % of the labels",
    ("in1k_semi_1", "in1k_semi_10"),
    (
        *_semi(1, {OSS: "18.98 44.05", OSS_RANDOM: "1.56 4.99", OSS_SUPERVISED: "68.68 88.87"}),
        *_semi(10, {OSS: "54.75 80.21", OSS_RANDOM: "21.78 44.24", OSS_SUPERVISED: "74.53 92.19"}),
    ),
    ("The best setting of the grid of learning rates and head multipliers, as published.",),
    processes=4,
    options=("--grid",),
)

_KNN = BenchmarkTable(
    "ImageNet-1k, weighted nearest neighbours (top-1)",
    ("in1k_knn",),
    cells(
        [f"k = {k}" for k in (10, 20, 100, 200)],
        [f"top1/k={k}" for k in (10, 20, 100, 200)],
        {MM: "11.0 11.9 12.6 12.4"},
    ),
    (_FEBRUARY,),
    processes=8,
)

_VOC_DETECTION = BenchmarkTable(
    "VOC07+12 detection, Faster R-CNN C4, 24k iterations",
    ("voc0712_det",),
    cells(
        ("AP50", "AP", "AP75"),
        ("AP50", "AP", "AP75"),
        {
            MM: "79.67 - -",
            OSS: "80.91 55.52 61.39",
            OSS_RANDOM: "59.02 32.83 31.60",
            OSS_SUPERVISED: "81.58 54.19 59.80",
        },
    ),
    (
        "mmselfsup's detector is mmdet's, OpenSelfSup's is detectron2's: normalisation decay, "
        "precise BN and difficult boxes differ.",
        _OLDEST,
    ),
    processes=8,
)

_PARTS = ("AP", "AP50", "AP75")
_COCO = BenchmarkTable(
    "COCO, Mask R-CNN FPN, 1x",
    ("coco_det",),
    cells(
        [f"{kind} {part}" for kind in ("box", "mask") for part in _PARTS],
        [f"{kind}/{part}" for kind in ("box", "mask") for part in _PARTS],
        {
            MM: "37.9 56.5 41.5 34.2 53.9 36.7",
            OSS_C4: "40.0 59.3 43.6 34.9 56.0 37.4",
            OSS_C4_RANDOM: "35.6 54.6 38.2 31.4 51.5 33.5",
            OSS_C4_SUPERVISED: "40.0 59.9 43.1 34.7 56.5 36.9",
        },
    ),
    (
        "OpenSelfSup's columns are of another detector and twice the schedule: compare them only "
        "with one another.",
        _OLDEST,
    ),
    processes=8,
)

_VOC_SEGMENTATION = BenchmarkTable(
    "VOC12+Aug segmentation, FCN, 20k iterations",
    ("voc12aug_seg",),
    cells(("mIoU",), ("mIoU",), {MM: "64.31"}),
    (_OLDEST,),
    processes=4,
)

_CITYSCAPES = BenchmarkTable(
    "Cityscapes segmentation, FCN, 40k iterations",
    ("cityscapes_seg",),
    (Cell("mIoU", ("mIoU",)),),
    ("No results of rotation prediction are published.",),
    processes=4,
)

_BLOCKS = ("conv1", "conv2", "conv3", "conv4")
_NIN = BenchmarkTable(
    "CIFAR-10, probes of the paper's network-in-network (top-1)",
    ("cifar10_probes",),
    (
        *cells(
            [f"{block}, non-linear" for block in _BLOCKS],
            [f"top1/{block}/nonlinear" for block in _BLOCKS],
            {PAPER: "85.07 89.06 86.21 61.73", RERUN: "84.65 88.89 85.88 54.04"},
        ),
        *cells(
            [f"{block}, convolutional" for block in _BLOCKS],
            [f"top1/{block}/conv" for block in _BLOCKS],
            {PAPER: "- 91.16 - -"},
        ),
        *cells(
            [f"{block}, linear" for block in _BLOCKS], [f"top1/{block}" for block in _BLOCKS], {}
        ),
    ),
    ("The published numbers are of the best test epoch; ours are of the last.",),
)

TABLES = (
    _LINEAR,
    _PLACES,
    _INAT,
    _SVM,
    _LOW_SHOT,
    _KNN,
    _SEMI,
    _VOC_DETECTION,
    _COCO,
    _VOC_SEGMENTATION,
    _CITYSCAPES,
    _NIN,
)
"""Tables that the page always shows, in this order. Recipes in none of them follow."""

TITLES = {
    "in1k_rotation": "ImageNet-1k, rotation prediction with the weights' own head",
    "cifar10_rotation": "CIFAR-10, rotation prediction with the weights' own head",
    "cifar10_linear": "CIFAR-10, linear classifiers",
    "cifar10_knn": "CIFAR-10, weighted nearest neighbours",
    "cifar10_svm": "CIFAR-10, linear SVM, one-vs-rest",
    "cifar10_lowshot": "CIFAR-10, low-shot SVM (mean ± deviation over the draws)",
    "cifar10_semi_1": "CIFAR-10, fine-tuning on 1 % of the labels",
    "cifar10_semi_10": "CIFAR-10, fine-tuning on 10 % of the labels",
    "places205_mhead_vissl": "Places205, linear classifiers as VISSL trains them",
    "quickstart_linear": "Scanned digits, linear classifiers",
}
"""Headings of recipes in none of the `TABLES`; without one, the recipe's name is the heading."""

PRETEXT = {
    "rotnet_in1k_alexnet": "89.18 (the released weights, by a user: issue 8 of the paper's code)",
    "rotnet_cifar10_nin": "93.65 (a user's rerun: issue 6 of the paper's code)",
}
"""Rotation accuracy reported by others, by recipe."""

OTHERS = (
    ("ImageNet linear, layer not named, ResNet-50, 105 epochs", "48.2", "VISSL, MODEL_ZOO.md"),
    ("the same, pretrained on ImageNet-22k", "54.89", "VISSL, MODEL_ZOO.md"),
    ("the same, AlexNet, the paper's weights", "39.51", "VISSL, MODEL_ZOO.md"),
    ("the same, ClusterFit from RotNet, ResNet-50", "53.63", "VISSL, MODEL_ZOO.md"),
    ("ImageNet linear, AlexNet conv1/conv3/conv4/conv5", "18.8 / 38.7 / 38.2 / 36.5", PAPER.name),
    ("ImageNet non-linear, AlexNet conv4/conv5", "50.0 / 43.8", PAPER.name),
    ("VOC07 classification, AlexNet fc6-8 / all", "70.87 / 72.97", PAPER.name),
    ("VOC07 detection, AlexNet", "54.4", "README of the paper's code"),
    ("VOC12 segmentation, AlexNet", "39.1", PAPER.name),
    ("CIFAR-10, RotNet + conv, fine-tuned", "92.17", PAPER.name),
    ("CIFAR-10, supervised NIN", "92.80", PAPER.name),
    ("CIFAR-10, random frozen features + conv", "72.50", PAPER.name),
)
"""Published numbers of other networks or layers: (what, number, source)."""
