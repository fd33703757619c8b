"""RoI heads: aligned pooling, losses, class-specific boxes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from rotpred.models.detection.masks import mask_loss
from rotpred.models.detection.roi_heads import (
    BoxPredictor,
    Heads,
    Pooler,
    box_losses,
)


def ramps(strides: dict[str, int], side: int) -> dict[str, torch.Tensor]:
    """Feature maps with x and y of each cell centre in pixels, and the number of the level."""
    maps = {}
    for k, (name, stride) in enumerate(strides.items()):
        middle = (torch.arange(side // stride) + 0.5) * stride
        x, y = middle.expand(len(middle), -1), middle[:, None].expand(-1, len(middle))
        maps[name] = torch.stack((x, y, torch.full_like(x, float(k))))[None]
    return maps


@pytest.mark.parametrize("levels", [("res4",), ("p2", "p3", "p4", "p5")])
def test_pooling_is_aligned(levels: tuple[str, ...]) -> None:
    """On a map of coordinates every bin holds its centre, on any level; choice of the level."""
    strides = {"res4": 16} if len(levels) == 1 else dict(zip(levels, (4, 8, 16, 32), strict=True))
    boxes = [
        torch.tensor([[70.0, 83, 70 + side, 83 + side * 0.9] for side in sides])
        for sides in ((300.0, 20, 150), (500,))
    ]
    maps = {name: m.expand(2, -1, -1, -1) for name, m in ramps(strides, 768).items()}
    pooled = Pooler(7, strides)(maps, boxes)
    assert pooled.shape == (4, 3, 7, 7)
    steps = (torch.arange(7) + 0.5) / 7
    for values, (left, top, right, bottom) in zip(pooled, torch.cat(boxes).tolist(), strict=True):
        x, y = left + steps * (right - left), top + steps * (bottom - top)
        torch.testing.assert_close(values[0], x.expand(7, 7), rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(values[1], y[:, None].expand(7, 7), rtol=1e-4, atol=1e-2)
    if len(levels) > 1:  # floor(4 + log2(sqrt(area) / 224)), between 2 and 5
        assert [float(one[2, 0, 0]) for one in pooled] == [2, 0, 1, 3]


def test_losses_of_the_heads_by_hand() -> None:
    draw = np.random.default_rng(0)
    logits, deltas = draw.normal(size=(6, 4)), draw.normal(size=(6, 3, 4))
    goals, labels = draw.normal(size=(6, 4)), np.array([0, 3, 1, 0, 2, 0])
    found = box_losses(*(torch.from_numpy(part) for part in (logits, deltas, labels, goals)))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    entropy = -np.mean([np.log(share[label]) for share, label in zip(shares, labels, strict=True)])
    distance = sum(np.abs(deltas[i, labels[i] - 1] - goals[i]).sum() for i in (1, 2, 4)) / 6
    assert float(found["cls"]) == pytest.approx(entropy)
    assert float(found["box"]) == pytest.approx(distance)
    masks, wanted = draw.normal(size=(3, 3, 5, 5)), draw.integers(0, 2, (3, 5, 5)).astype(float)
    p = 1 / (1 + np.exp(-masks[range(3), labels[[1, 2, 4]] - 1]))
    expected = -np.mean(wanted * np.log(p) + (1 - wanted) * np.log(1 - p))
    positive = torch.from_numpy(labels[[1, 2, 4]])
    loss = mask_loss(torch.from_numpy(masks), positive, torch.from_numpy(wanted))
    assert float(loss) == pytest.approx(expected)
    nothing = mask_loss(torch.zeros(0, 3, 5, 5), positive[:0], torch.zeros(0, 5, 5))
    assert float(nothing) == 0


def test_every_class_has_its_own_box() -> None:
    """Deltas in tenths and fifths of the proposal's sides; clipped to the image."""
    heads = Heads(Pooler(7, {"res4": 16}), nn.Flatten(), BoxPredictor(8, 3), rois=8).eval()
    proposals = [torch.tensor([[20.0, 20, 40, 60], [60, 10, 80, 30]])]
    logits = torch.tensor([[0.0, 0, 9, 0], [9.0, 0, 0, 8]])
    deltas = torch.full((2, 3, 4), 3.0)
    deltas[0, 1] = torch.tensor([5.0, -2.5, 5 * math.log(0.5), 0])
    deltas[1, 2] = torch.tensor([0.0, 0, 0, 5 * math.log(3)])
    (found,) = heads._detect({}, logits, deltas, proposals, [(35, 78)])
    assert found["labels"].tolist() == [2, 3]
    # Centre 30 + 0.5 * 20 and 40 - 0.25 * 40, width 20 / 2; then centre 20, height 3 * 20.
    expected = torch.tensor([[35.0, 10, 45, 35], [60, 0, 78, 35]])
    torch.testing.assert_close(found["boxes"], expected)
    shares = [math.exp(9) / (math.exp(9) + 3), math.exp(8) / (math.exp(8) + math.exp(9) + 2)]
    torch.testing.assert_close(found["scores"], torch.tensor(shares))
