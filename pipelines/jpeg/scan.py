"""Full check of a baseline JPEG's scan: is it complete, and where are its blocks?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.arrays import Int64, Uint8
from pipelines.jpeg.huffman import BAD_TABLE, BLOCK, OK, PAD, REASONS, walk
from pipelines.jpeg.markers import ImageError, JpegHeader


@dataclass(frozen=True, eq=False)
class Scan:
    """The only scan of a sequential image, checked to its end."""

    header: JpegHeader
    end: int
    """Offset just after the end marker."""
    spare: int
    """Number of whole coded bytes that belong to no block."""
    columns: int
    """MCUs per row."""
    rows: int
    """Rows of MCUs."""
    mcu_width: int
    """Pixels."""
    mcu_height: int
    """Pixels."""
    units: Int64
    """(U,), component of each block in an MCU."""
    slots: Int64
    """(3, 2), rows of each component's Huffman tables, as `huffman.walk` takes them."""
    clean: Uint8
    """(bytes,), coded data without stuffing."""
    ends: Int64
    """(segments,), the bit after the last block of each restart segment of the input."""
    blocks: npt.NDArray[np.void]
    """(blocks,), of dtype `huffman.BLOCK`."""


def walk_scan(data: bytes, header: JpegHeader) -> Scan | None:
    """Walk over every Huffman code of a baseline image.

    Args:
        data: The JPEG stream.
        header: Its header.

    Returns:
        The scan; None if the image is not supported. Supported are sequential 8-bit images with 1
        or 3 components, sampling factors 1, 2 or 4, and a single scan of all components.

    Raises:
        ImageError: The coded data are damaged; the message says how and where.
    """
    if header.frame not in (0xC0, 0xC1) or header.precision != 8:
        return None
    count = header.components
    body = data[header.scan + 4 : header.coded]
    if count not in (1, 3) or len(body) != 4 + 2 * count or body[0] != count:
        return None
    if body[-3:] != b"\x00\x3f\x00":
        return None
    at = header.frame_at + 10
    known = {data[at + 3 * c]: data[at + 3 * c + 1] for c in range(count)}
    for c in range(count):
        if data[at + 3 * c + 2] not in header.quantizers:
            raise ImageError(f"no quantization table {data[at + 3 * c + 2]} before the scan")
    chosen = [(body[1 + 2 * c], body[2 + 2 * c]) for c in range(count)]
    if len(known) != count or {name for name, _ in chosen} != set(known):
        return None
    factors = [(known[name] >> 4, known[name] & 15) for name, _ in chosen]
    if any(tables & 0xCC for _, tables in chosen):
        return None
    if not all(h in (1, 2, 4) and v in (1, 2, 4) for h, v in factors):
        return None
    if count == 1:  # A scan of one component is not interleaved, whatever its factors.
        factors = [(1, 1)]
    repeats = [h * v for h, v in factors]
    if sum(repeats) > 10:
        return None
    width, height = 8 * max(h for h, _ in factors), 8 * max(v for _, v in factors)
    columns, rows = -(-header.width // width), -(-header.height // height)
    mcus, units = columns * rows, np.repeat(np.arange(count), repeats)
    slots = np.array([(t >> 4, 4 + (t & 3)) for _, t in chosen] * (3 // count), np.int64)
    # Every block has at least two codes of at least one bit each.
    if mcus * len(units) > 4 * len(data):
        raise ImageError(f"{header.width} x {header.height} pixels in {len(data)} bytes of data")
    segments = -(-mcus // header.restart) if header.restart else 1
    clean = np.empty(len(data) - header.coded + PAD, np.uint8)
    ends, blocks = np.empty(segments, np.int64), np.empty(mcus * len(units), BLOCK)
    status, mcu, end, spare = walk(
        np.frombuffer(data, np.uint8), header.coded, table_bounds(header), units, slots, mcus,
        header.restart, clean, np.empty(segments + 1, np.int64), ends, blocks,
    )  # fmt: skip
    if end >= len(data):
        raise ImageError(f"truncated: no end marker in {len(data)} bytes")
    if status == BAD_TABLE:
        return None  # Some decoders supply default tables to streams that lack them.
    if status != OK:
        raise ImageError(f"damaged: {REASONS[status]}, in MCU {mcu} of {mcus}")
    if data[end + 1] != 0xD9:
        return None
    return Scan(
        header=header, end=end + 2, spare=spare, columns=columns, rows=rows, mcu_width=width,
        mcu_height=height, units=units, slots=slots, clean=clean, ends=ends, blocks=blocks,
    )  # fmt: skip


def table_bounds(header: JpegHeader) -> Int64:
    """(n, 2), start and end of each DHT segment's body."""
    return np.array(header.tables, np.int64).reshape(-1, 2)
