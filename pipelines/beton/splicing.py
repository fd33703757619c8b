"""Spliced JPEG streams for the crops of a batch."""

from __future__ import annotations

import numpy as np

from pipelines.arrays import Int32, Int64, Uint8
from pipelines.beton.reader import Beton
from pipelines.imaging.decode import ImageError
from pipelines.jpeg.splice import MISMATCH_REASON, splice


def splice_batch(beton: Beton, indices: Int64, boxes: Int32) -> tuple[list[Uint8], Int32]:
    """Return JPEG streams that contain the crops, for a decoder that takes encoded images.

    Args:
        beton: The data set, with or without a side file.
        indices: int64 (B,), the samples.
        boxes: int32 (B, 4 or more), crop boxes: top, left, height, width, ...

    Returns:
        B streams, uint8 (bytes,), each new or a view of the file; and the crop boxes, relative to
        the images of the streams.

    Raises:
        ImageError: The side file disagrees with the bytes of a sample. Names the sample.
    """
    segments = beton.segments
    if segments is None:
        return [beton.payload(int(i)) for i in indices], boxes
    streams, shifted = [], boxes.copy()
    for i, box in zip(indices.tolist(), shifted, strict=True):
        stored = beton.payload(i)
        out = np.empty(len(stored), np.uint8)
        written, y0, x0, _, _ = splice(
            beton.data, int(beton.offsets[i]), len(stored), segments.records[i], segments.lengths,
            int(beton.heights[i]), int(beton.widths[i]), box, out,
        )  # fmt: skip
        if written < 0:
            raise ImageError(f"{beton.path}: sample {i}: {MISMATCH_REASON}")
        streams.append(out[:written] if written else stored)
        box[0] -= y0
        box[1] -= x0
    return streams, shifted
