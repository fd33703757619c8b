"""Parts of the segmentation protocol: sliding windows, loss, settings, full-size shapes."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipelines.datasets.annotations import IGNORED
from pipelines.dense.batch import DenseBatch
from pipelines.dense.spec import FitWithin, RatioCrop
from rotpred.distributed import Rank
from rotpred.models.backbone import build_backbone
from rotpred.protocols.segmentation import SegmentationTask, slide
from rotpred.recipes.segmentation import RECIPES, Segmentation, cityscapes_seg, voc12aug_seg
from rotpred.training.schedule import lr_at
from tests.support.references import naive_slide


@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [((20, 31), 12, 8), ((12, 12), 12, 5), ((7, 30), 12, 12), ((5, 6), 12, 4), ((28, 20), 12, 8)],
)
def test_sliding_windows(size: tuple[int, int], crop: int, stride: int) -> None:
    """Each pixel is the mean over all windows that cover it; borders of windows have an effect."""
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3)
    seen = []

    def logits_of(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape[2:]))
        return F.conv2d(x, weight, padding=1).relu()

    image = torch.randn(1, 3, *size)
    found = slide(logits_of, image, crop, stride)
    count = len(seen)
    torch.testing.assert_close(found, naive_slide(logits_of, image, crop, stride))
    assert seen[:count] == seen[count:]
    assert set(seen) == {(min(crop, size[0]), min(crop, size[1]))}


def test_windows_of_cityscapes() -> None:
    """Eight windows of 769 in an image of 1025 x 2049, the first and last at its corners."""
    corners = []

    def logits_of(x: torch.Tensor) -> torch.Tensor:
        corners.append((float(x[0, 0, 0, 0]), float(x[0, 1, 0, 0]), *x.shape[2:]))
        return x[:, :1]

    places = torch.meshgrid(torch.arange(1025.0), torch.arange(2049.0), indexing="ij")
    slide(logits_of, torch.stack([*places, places[0]])[None], 769, 513)
    assert corners == [(y, x, 769, 769) for y in (0, 256) for x in (0, 513, 1026, 1280)]


def test_objective_by_hand() -> None:
    """Both losses over all pixels, the auxiliary one weighted; accuracy over labelled pixels."""
    draw = np.random.default_rng(1)
    masks = torch.from_numpy(draw.integers(0, 3, (2, 16, 24)))
    masks[0, :5], masks[1, :, 20:] = IGNORED, IGNORED
    outputs = [torch.from_numpy(draw.normal(size=(2, 3, 2, 3))).float() for _ in range(2)]

    def model(images: torch.Tensor) -> list[torch.Tensor]:
        assert images.shape == (2, 3, 16, 24)
        return outputs

    state: Any = SimpleNamespace(step=3, rank=Rank(), model=model, autocast=contextlib.nullcontext)
    none = torch.zeros(2, 2, dtype=torch.int64)
    batch = DenseBatch(torch.zeros(2, 3, 16, 24), none, none, none[0], none[0] == 0, [], masks)
    for align in (False, True):
        recipe = Segmentation(align_corners=align, aux_weight=0.25)
        loss, shown = SegmentationTask(recipe).objective(state, batch)
        losses = []
        for logits in outputs:
            large = torch.nn.Upsample((16, 24), mode="bilinear", align_corners=align)(logits)
            shares = large.double().softmax(1)
            counted = masks != IGNORED
            of_truth = shares.gather(1, masks.where(counted, 0)[:, None])[:, 0]
            losses.append(float(-of_truth.log()[counted].sum()) / masks.numel())
            if logits is outputs[0]:
                right = (shares.argmax(1) == masks)[counted].double().mean()
        assert float(loss) == pytest.approx(losses[0] + 0.25 * losses[1], rel=1e-5)
        assert float(shown["loss"]) == float(loss)
        assert float(shown["loss/decode"]) == pytest.approx(losses[0], rel=1e-5)
        assert float(shown["accuracy"]) == pytest.approx(100 * float(right), rel=1e-5)
    with pytest.raises(ValueError, match="no masks"):
        SegmentationTask(recipe).objective(state, batch._replace(masks=None))


def test_the_published_settings() -> None:
    """docs/protocols.md, Segmentation."""
    for made, crop, frame, batch, steps in (
        (voc12aug_seg(), 512, (2048, 512), 16, 20_000),
        (cityscapes_seg(), 769, (2049, 1025), 8, 40_000),
    ):
        assert RECIPES[made.name]() == made and made.backbone == "resnet50"
        assert made.train.geometry == RatioCrop(crop, *frame, ratio=(0.5, 2.0), most=0.75)
        assert made.val.geometry == FitWithin(*frame)
        assert made.train.photometric and made.train.flip
        assert not (made.val.photometric or made.val.flip or made.val.train)
        assert made.train.divisor == made.val.divisor == made.val.batch_size == 1
        assert 4 * made.train.batch_size == made.optim.reference_batch == batch
        assert made.train.steps_per_epoch is not None
        assert made.run.epochs * made.train.steps_per_epoch == steps
        assert (made.optim.lr, made.optim.momentum, made.optim.weight_decay) == (0.01, 0.9, 5e-4)
        assert made.optim.decay_rule == "all" and not made.optim.nesterov
        # mmcv's poly: (lr - 1e-4) * (1 - t) ** 0.9 + 1e-4.
        rates = [lr_at(made.schedule, made.optim.lr, t, 10) for t in (0, 5, 10)]
        assert rates == pytest.approx([0.01, 0.0099 * 0.5**0.9 + 1e-4, 1e-4])
        assert (made.aux_weight, made.dropout, made.sync_bn) == (0.4, 0.1, "torch")
    assert (voc12aug_seg().test, voc12aug_seg().align_corners) == ("whole", False)
    made = cityscapes_seg()
    assert (made.test, made.slide_crop, made.slide_stride) == ("slide", 769, 513)
    assert made.align_corners and made.val.data == "cityscapes:val"


@pytest.mark.parametrize(
    ("name", "classes", "side"), [("voc12aug_seg", 21, 64), ("cityscapes_seg", 19, 97)]
)
def test_shapes_at_true_size(name: str, classes: int, side: int) -> None:
    """Logits of the published crops, on the meta device."""
    made = RECIPES[name]()
    geometry = made.train.geometry
    assert isinstance(geometry, RatioCrop)
    with torch.device("meta"):
        model = SegmentationTask(made).network(build_backbone(made.backbone), classes)
        x = torch.empty(made.train.batch_size, 3, geometry.size, geometry.size)
        for logits in (*model.train()(x), model.eval()(x)):
            assert logits.shape == (len(x), classes, side, side)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slide_stride": 0}, "slide_stride"),
        ({"slide_stride": 770}, "gaps"),
        ({"dropout": 1.0}, "dropout"),
        ({"aux_weight": float("nan")}, "aux_weight"),
    ],
)
def test_senseless_values_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Segmentation(**changes)
