"""Sliding windows, as slow and plain as can be."""

from __future__ import annotations

from collections.abc import Callable

import torch


def naive_slide(
    logits_of: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, crop: int, stride: int
) -> torch.Tensor:
    """As mmsegmentation describes it: a grid of windows, each moved back inside the image."""
    height, width = image.shape[2:]
    rows = max(height - crop + stride - 1, 0) // stride + 1
    columns = max(width - crop + stride - 1, 0) // stride + 1
    lists: dict[tuple[int, int], list[torch.Tensor]] = {}
    for row in range(rows):
        for column in range(columns):
            bottom = min(row * stride + crop, height)
            right = min(column * stride + crop, width)
            top, left = max(bottom - crop, 0), max(right - crop, 0)
            logits = logits_of(image[:, :, top:bottom, left:right])[0]
            for y in range(top, bottom):
                for x in range(left, right):
                    lists.setdefault((y, x), []).append(logits[:, y - top, x - left])
    return torch.stack(
        [
            torch.stack([torch.stack(lists[y, x]).mean(0) for x in range(width)], dim=1)
            for y in range(height)
        ],
        dim=1,
    )[None]
