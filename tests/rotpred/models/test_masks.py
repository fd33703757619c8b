"""Masks of detected objects: targets, pasting into the image."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from rotpred.models.detection.masks import mask_targets, paste_masks


def test_goals_of_masks() -> None:
    """A bin is set where its part of the mask is set: here every bin covers whole pixels."""
    draw = np.random.default_rng(1)
    masks = torch.from_numpy(draw.integers(0, 2, (3, 10, 10), np.uint8)).repeat_interleave(4, 1)
    masks = masks.repeat_interleave(4, 2)
    boxes = torch.tensor([[4.0, 8, 28, 32], [0, 0, 24, 24], [16, 16, 40, 40]])
    found = mask_targets(masks, boxes, torch.tensor([2, 0, 2]), 6)
    for goal, (left, top, right, bottom), k in zip(found, boxes.int(), (2, 0, 2), strict=True):
        assert torch.equal(goal, masks[k, top:bottom:4, left:right:4].float())


def test_masks_are_pasted_as_a_loop_does() -> None:
    """Bilinear at every pixel centre, zero outside the box and the image."""
    draw = np.random.default_rng(2)
    masks = draw.random((4, 5, 5)).astype(np.float32)
    boxes = np.array([[3.3, 2.1, 17.8, 12.4], [-4, -3, 6, 9.5], [12, 8, 30, 25], [5, 5, 5, 9]])
    height, width = 16, 20
    found = paste_masks(torch.from_numpy(masks), torch.from_numpy(boxes).float(), (height, width))
    for plane, mask, (left, top, right, bottom) in zip(found, masks, boxes, strict=True):
        padded = np.pad(mask, 1)
        for y, x in itertools.product(range(height), range(width)):
            if not (left < x + 0.5 < right and top < y + 0.5 < bottom):
                assert not plane[y, x]
                continue
            u = (x + 0.5 - left) / (right - left) * 5 + 0.5
            v = (y + 0.5 - top) / (bottom - top) * 5 + 0.5
            i, j = int(v), int(u)
            share = np.outer([1 - v + i, v - i], [1 - u + j, u - j])
            value = float((padded[i : i + 2, j : j + 2] * share).sum())
            if abs(value - 0.5) > 1e-5:
                assert bool(plane[y, x]) == (value >= 0.5), (y, x)
    assert found[:3].any(2).any(1).all() and not found[3].any()
