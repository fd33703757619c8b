"""Masks of detected objects: predictor, targets, loss, and pasting into the image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align


class MaskPredictor(nn.Module):
    """Predicts one mask per class at twice the resolution, in float32; Kaiming normal init."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.masks = nn.Conv2d(channels, classes, 1)
        for layer in (self.up, self.masks):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (R, channels, s, s) to logits (R, C, 2 s, 2 s)."""
        x = F.relu(self.up(x))
        with torch.autocast(x.device.type, enabled=False):
            logits: torch.Tensor = self.masks(x.float())
        return logits


def mask_targets(
    masks: torch.Tensor, boxes: torch.Tensor, which: torch.Tensor, size: int
) -> torch.Tensor:
    """Crop object masks to boxes and resize them to (size, size).

    Args:
        masks: uint8 (N, h, w), 0 or 1, of the objects of an image.
        boxes: float32 (K, 4), in pixels of the image.
        which: int64 (K,), index of each box's object.
        size: Bins per side. A bin is 1 if at least half of its samples are inside the object.

    Returns:
        float32 (K, size, size), 0 or 1.
    """
    # Only the masks in use, once each: as floats they take four times the memory.
    used, place = torch.unique(which, return_inverse=True)
    rois = torch.cat((place[:, None].to(boxes.dtype), boxes), 1)
    planes = masks[used][:, None].to(boxes.dtype)
    shares = roi_align(planes, rois, size, 1.0, sampling_ratio=0, aligned=True)[:, 0]
    inside: torch.Tensor = shares >= 0.5
    return inside.to(boxes.dtype)


def mask_loss(logits: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return the mean binary cross entropy of the masks of the true classes, a scalar.

    Args:
        logits: (K, C, s, s).
        labels: int64 (K,), from 1.
        truth: (K, s, s), 0 or 1.
    """
    if not len(labels):
        return logits.sum() * 0  # the mean over nothing would be NaN
    own = logits[torch.arange(len(labels), device=labels.device), labels - 1]
    return F.binary_cross_entropy_with_logits(own, truth)


def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Paste masks within boxes into masks of the whole image.

    Bilinear, sampled at the centre of each pixel; False outside of the box.

    Args:
        masks: (K, s, s), probabilities.
        boxes: (K, 4), in pixels of the image.
        size: Height and width (h, w) of the image.

    Returns:
        bool (K, h, w), on the device of the masks: where the probability is at least 0.5.
    """
    height, width = size
    pasted = torch.zeros((len(masks), height, width), dtype=torch.bool, device=masks.device)
    for plane, mask, box in zip(pasted, masks, boxes.tolist(), strict=True):
        left, top, right, bottom = box
        x0, x1 = max(0, math.floor(left)), min(width, math.ceil(right))
        y0, y1 = max(0, math.floor(top)), min(height, math.ceil(bottom))
        if x0 >= x1 or y0 >= y1 or right <= left or bottom <= top:
            continue
        xs = torch.arange(x0, x1, device=masks.device) + 0.5
        ys = torch.arange(y0, y1, device=masks.device) + 0.5
        # From -1 at one edge of the box to 1 at the other.
        across = (2 * (xs - left) / (right - left) - 1).expand(len(ys), -1)
        down = (2 * (ys - top) / (bottom - top) - 1)[:, None].expand(-1, len(xs))
        grid = torch.stack((across, down), -1)
        values = F.grid_sample(mask[None, None].float(), grid[None].float(), align_corners=False)
        plane[y0:y1, x0:x1] = values[0, 0] >= 0.5
    return pasted
