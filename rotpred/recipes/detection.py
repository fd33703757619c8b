"""Detection recipes. Each docstring: source, command, published result."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from pipelines.checks import NonEmptyStr
from pipelines.dense.spec import DenseSpec, ShortSide
from rotpred.models.detection.settings import C4, FPN, BoxHead, Proposals
from rotpred.recipes.base import FromWeights, Trained
from rotpred.training.schedule import Schedule, Steps
from rotpred.training.settings import Optim, RunSettings, SyncBn


@dataclass(frozen=True)
class Detection(Trained, FromWeights):
    """Training of a two-stage detector on a pretrained backbone, all layers."""

    name: str = "detection"
    model: Literal["faster_rcnn_c4", "mask_rcnn_fpn"] = "faster_rcnn_c4"
    """Faster R-CNN on the feature map of res4, or Mask R-CNN on a feature pyramid. If the data have
    no masks, Mask R-CNN learns boxes only."""
    box_head: BoxHead = "4conv1fc"
    """Box head of mask_rcnn_fpn: 4conv1fc is mmdetection's, with batch norm in box and mask head;
    2fc is detectron2's, without."""
    proposals: Proposals = C4
    """Anchor sizes and numbers of proposals; reduce both for small images."""
    train: DenseSpec = field(
        default_factory=lambda: DenseSpec(
            data="voc:2007/trainval+2012/trainval",
            batch_size=2,
            geometry=ShortSide(tuple(range(480, 801, 32)), 1333),
            steps_per_epoch=2000,
        )
    )
    """Training data."""
    val: DenseSpec = field(
        default_factory=lambda: DenseSpec(
            data="voc:2007/test",
            batch_size=1,
            geometry=ShortSide((800,), 1333),
            flip=False,
            train=False,
        )
    )
    """Validation data."""
    optim: Optim = field(
        default_factory=lambda: Optim(
            lr=0.02, weight_decay=1e-4, decay_rule="no_norm", reference_batch=16
        )
    )
    """Optimiser of the whole network. detectron2 has decay_rule no_norm, mmdetection has all."""
    schedule: Schedule = field(
        default_factory=lambda: Steps((9, 11), warmup_epochs=0.05, warmup_start_factor=0.001)
    )
    """Learning rate over time."""
    sync_bn: SyncBn = "torch"
    predictions: NonEmptyStr | None = None
    """Instead of training, score these detections on the validation data: a file in COCO's JSON
    results format or, for VOC, a folder of the devkit's text files."""
    run: RunSettings = field(default_factory=lambda: RunSettings(epochs=12, precision="fp32"))


def voc0712_det() -> Detection:
    """VOC 2007 + 2012: Faster R-CNN, ResNet-50-C4, 24k iterations, 8 GPUs x 2 images.

    Source: MoCo, detection/configs/pascal_voc_R_50_C4_24k.yaml; mmselfsup, configs/benchmarks/
    mmdetection/voc0712/faster-rcnn_r50-c4_ms-24k_voc0712.py: SGD 0.02, momentum 0.9, decay 1e-4,
    x0.1 at 18k and 22k, warm-up over 100 iterations from a factor of 0.001; short side 480 to 800
    in steps of 32, long side at most 1333, flip; test at 800; SyncBN, nothing frozen, one extra
    batch norm after res5.
    Note: the two differ. detectron2, as here, trains on difficult objects and does not decay norms;
    for mmdetection's variant: --train.no-keep-difficult --optim.decay-rule all. Not implemented:
    detectron2's PreciseBN, which re-estimates batch norm statistics from 200 batches before each
    validation.
    AP is detectron2's: 11-point AP, averaged over ten IoU thresholds. AP/area is the area under the
    whole curve.
    Command: torchrun --nproc-per-node 8 scripts/evaluate.py voc0712_det --weights FILE
    (published in fp32; --run.precision bf16 for mixed precision. With fewer GPUs, learning rate and
    number of steps are scaled; the log shows how.)
    Published, AP50: 79.67 (mmselfsup). AP50/AP/AP75 (OpenSelfSup): 80.91/55.52/61.39; random
    weights 59.02/32.83/31.60, supervised 81.58/54.19/59.80.
    """
    return Detection(name="voc0712_det")


def coco_det() -> Detection:
    """COCO 2017: Mask R-CNN, ResNet-50-FPN, 12 epochs, 8 GPUs x 2 images.

    Source: mmselfsup, configs/benchmarks/mmdetection/coco/mask-rcnn_r50_fpn_ms-1x_coco.py: SGD
    0.02, momentum 0.9, decay 1e-4 (norms too), x0.1 after 8 and 11 epochs of 7,330 iterations;
    warm-up over 500 iterations from a factor of 0.001; short side 640 to 800 in steps of 32, long
    side at most 1333, flip; test at 800; SyncBN in backbone, pyramid and heads, nothing frozen.
    detectron2's variant (coco_R_50_FPN_1x_moco.yaml): --box-head 2fc --optim.decay-rule no_norm
    --schedule.warmup-epochs 0.1364.
    Command: torchrun --nproc-per-node 8 scripts/evaluate.py coco_det --weights FILE
    Published (mmselfsup), box AP/AP50/AP75: 37.9/56.5/41.5, mask AP/AP50/AP75: 34.2/53.9/36.7.
    """
    base = Detection()
    root = "data/coco"
    return replace(
        base,
        name="coco_det",
        model="mask_rcnn_fpn",
        proposals=FPN,
        train=replace(
            base.train,
            data="coco:train2017",
            root=root,
            geometry=ShortSide(tuple(range(640, 801, 32)), 1333),
            steps_per_epoch=7330,
            # train2017 has boxes without area. Unreadable data still end the run.
            max_invalid_annotations=10,
        ),
        val=replace(base.val, data="coco:val2017", root=root),
        optim=replace(base.optim, decay_rule="all"),
        schedule=Steps((8, 11), warmup_epochs=500 / 7330, warmup_start_factor=0.001),
    )


RECIPES = {recipe.__name__: recipe for recipe in (voc0712_det, coco_det)}
