"""JPEG marker parser: headers and stream structure, without decoding pixels."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

MAX_PIXELS = 100_000_000
"""Limit on the pixels of an image; larger ones are rejected before any allocation."""

_SOI, _EOI, _SOS, _DHT, _DQT, _DRI, _DNL = 0xD8, 0xD9, 0xDA, 0xC4, 0xDB, 0xDD, 0xDC
_APP0, _APP1, _APP14 = 0xE0, 0xE1, 0xEE
_ALONE = frozenset((0x01, *range(0xD0, 0xD8)))
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ORIENTATION = 0x0112


class ImageError(ValueError):
    """The bytes are not a usable image; the message says why in one line."""


@dataclass(frozen=True)
class JpegHeader:
    """What the markers of a JPEG stream say about its image."""

    height: int
    """Rows as stored, before the orientation is applied."""
    width: int
    """Columns as stored."""
    components: int
    """1 grey, 3 YCbCr or RGB, 4 CMYK or YCCK."""
    precision: int
    """Bits per component."""
    frame: int
    """Second byte of the start-of-frame marker, 0xC0 to 0xCF: the coding process."""
    orientation: int
    """Exif orientation, 1 to 8; 1 if the stream has no valid one."""
    frame_at: int
    """Offset of the start-of-frame marker."""
    tables: tuple[tuple[int, int], ...]
    """Start and end of the body of each Huffman table segment before the first scan."""
    quantizers: frozenset[int]
    """Numbers of the quantization tables before the first scan."""
    restart: int
    """MCUs between restart markers in the first scan; 0 if there are none."""
    scan: int
    """Offset of the first start-of-scan marker."""
    coded: int
    """Offset of the first scan's first entropy-coded byte."""
    end: int | None
    """Offset just after the end marker; None if only the header was read."""
    warning: str | None
    """The first recoverable oddity that a strict decoder warns about; None in clean streams."""

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width after the orientation is applied."""
        if self.orientation >= 5:
            return self.width, self.height
        return self.height, self.width

    @property
    def progressive(self) -> bool:
        """Whether the image comes in several scans of rising detail."""
        return self.frame in (0xC2, 0xC6, 0xCA, 0xCE)

    @property
    def arithmetic(self) -> bool:
        """Whether arithmetic coding replaces Huffman coding."""
        return self.frame >= 0xC9

    @property
    def lossless(self) -> bool:
        """Whether the frame is of the lossless process, which common decoders lack."""
        return self.frame in (0xC3, 0xC7, 0xCB, 0xCF)


class _Walk:
    """Parser state collected while walking the markers."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.frame: dict[str, int] = {}
        self.tables: list[tuple[int, int]] = []
        self.quantizers: set[int] = set()
        self.orientation: int | None = None
        self.restart = 0
        self.warning: str | None = None
        self._markers: list[int] | None = None

    def warn(self, what: str) -> None:
        """Record an oddity; only the first one is kept."""
        self.warning = self.warning or what

    def marker(self, pos: int) -> tuple[int, int]:
        """Find the marker at or after `pos`; return its code and the offset after it."""
        start = self.data.find(b"\xff", pos)
        if start > pos:
            self.warn(f"{start - pos} stray bytes before a marker at byte {pos}")
        while 0 <= start < len(self.data) - 1:
            code = self.data[start + 1]
            if code == 0xFF:
                start += 1
            elif code == 0:
                self.warn(f"stray bytes before a marker at byte {pos}")
                start = self.data.find(b"\xff", start + 2)
            else:
                return code, start + 2
        raise ImageError(f"the stream ends at byte {len(self.data)} where a marker was expected")

    def segment(self, code: int, pos: int) -> tuple[int, int]:
        """Return start and end of the body of the segment whose length field is at `pos`."""
        if pos + 2 > len(self.data):
            raise ImageError(f"the stream ends inside marker FF{code:02X} at byte {pos - 2}")
        length = int.from_bytes(self.data[pos : pos + 2], "big")
        if length < 2:
            raise ImageError(f"marker FF{code:02X} at byte {pos - 2} has length {length}")
        if pos + length > len(self.data):
            raise ImageError(
                f"marker FF{code:02X} at byte {pos - 2} wants {length} bytes, "
                f"only {len(self.data) - pos} are left"
            )
        return pos + 2, pos + length

    def body(self, code: int, start: int, stop: int) -> None:
        """Read the body of one segment."""
        if code in _FRAMES:
            self._frame(code, start, stop)
        elif code == _APP0 and self.data[start : start + 5] == b"JFIF\0" and stop - start >= 7:
            if self.data[start + 5] != 1:
                self.warn(f"JFIF version {self.data[start + 5]} at byte {start + 5}")
        elif code == _APP1 and self.data[start : start + 6] == b"Exif\0\0":
            if self.orientation is None:
                self.orientation = _exif_orientation(self.data[start + 6 : stop])
        elif code == _APP14 and self.data[start : start + 5] == b"Adobe" and stop - start >= 12:
            if self.data[start + 11] > 2:
                self.warn(f"Adobe transform {self.data[start + 11]} at byte {start + 11}")
        elif code == _DHT:
            self.tables.append((start, stop))
        elif code == _DQT:
            while start < stop:  # Each table: precision and number, then 64 values.
                self.quantizers.add(self.data[start] & 15)
                start += 129 if self.data[start] >> 4 else 65
        elif code == _DRI and stop - start >= 2:
            self.restart = int.from_bytes(self.data[start : start + 2], "big")

    def _frame(self, code: int, start: int, stop: int) -> None:
        data = self.data
        if self.frame:
            raise ImageError(f"a second frame header at byte {start - 4}")
        if stop - start < 6 or stop - start < 6 + 3 * data[start + 5]:
            raise ImageError(f"the frame header at byte {start - 4} is too short")
        precision, components = data[start], data[start + 5]
        height = int.from_bytes(data[start + 1 : start + 3], "big")
        width = int.from_bytes(data[start + 3 : start + 5], "big")
        if not height or not width:
            raise ImageError(f"the frame header at byte {start - 4} says {height} x {width} pixels")
        if components not in (1, 2, 3, 4):
            raise ImageError(f"the frame header at byte {start - 4} has {components} components")
        self.frame = {
            "height": height,
            "width": width,
            "components": components,
            "precision": precision,
            "frame": code,
            "frame_at": start - 4,
        }

    def check_scan(self, start: int, stop: int) -> None:
        """Record parameters that a sequential scan must not have."""
        sequential = self.frame["frame"] in (0xC0, 0xC1)
        if sequential and self.data[stop - 3 : stop] != b"\x00\x3f\x00":
            self.warn(f"a sequential scan with other parameters at byte {start}")

    def entropy(self, pos: int) -> int:
        """Return the offset of the marker that ends the entropy-coded data at `pos`."""
        if self._markers is None:
            # In entropy-coded data FF is followed by 00 (a stuffed FF), FF (fill) or a marker.
            stream = np.frombuffer(self.data, np.uint8)
            places = np.flatnonzero(stream[:-1] == 0xFF)
            codes = stream[places + 1]
            self._markers = places[(codes != 0) & (codes != 0xFF)].tolist()
        expected = 0
        for n in range(bisect_left(self._markers, pos), len(self._markers)):
            found = self._markers[n]
            code = self.data[found + 1]
            if not 0xD0 <= code <= 0xD7:
                return found
            if not self.restart or code != 0xD0 + expected:
                self.warn(f"an unexpected restart marker FF{code:02X} at byte {found}")
            expected = (code - 0xD0 + 1) % 8
        raise ImageError(f"truncated: no end marker in {len(self.data)} bytes")


def read_header(data: bytes, *, whole: bool = False) -> JpegHeader:
    """Walk the markers up to the first scan, or with `whole` through all scans to the end marker.

    Bytes after the end marker are ignored. Time is linear in the bytes walked.

    Args:
        data: The JPEG stream, from its first byte.
        whole: Also find the end marker and check for oddities between and inside the scans.

    Raises:
        ImageError: A marker is missing, cut short or contradicts another.
    """
    if data[:2] != b"\xff\xd8":
        raise ImageError(f"no JPEG start marker: begins with {bytes(data[:4])!r}")
    walk, pos = _Walk(data), 2
    header: JpegHeader | None = None
    while True:
        code, pos = walk.marker(pos)
        if code == _EOI:
            break
        if code in _ALONE:
            walk.warn(f"stray marker FF{code:02X} at byte {pos - 2}")
            continue
        if code == _SOI:
            raise ImageError(f"a second start marker at byte {pos - 2}")
        if code == _DNL:
            walk.warn(f"a line-count segment at byte {pos - 2}")
        start, stop = walk.segment(code, pos)
        if code != _SOS:
            walk.body(code, start, stop)
            pos = stop
            continue
        if not walk.frame:
            raise ImageError(f"a scan at byte {pos - 2} before any frame header")
        header = header or JpegHeader(
            **walk.frame,
            orientation=walk.orientation or 1,
            tables=tuple(walk.tables),
            quantizers=frozenset(walk.quantizers),
            restart=walk.restart,
            scan=pos - 2,
            coded=stop,
            end=None,
            warning=walk.warning,
        )
        if not whole:
            return header
        walk.check_scan(start, stop)
        pos = walk.entropy(stop)
    if header is None:
        raise ImageError(f"the stream ends at byte {pos} without an image")
    orientation = walk.orientation or 1
    return replace(header, orientation=orientation, end=pos, warning=walk.warning)


def _exif_orientation(tiff: bytes) -> int | None:
    """Read the orientation in the first directory of an Exif block; None if it is not valid."""
    order: Literal["little", "big"]
    if tiff[:4] == b"II*\0":
        order = "little"
    elif tiff[:4] == b"MM\0*":
        order = "big"
    else:
        return None
    start = int.from_bytes(tiff[4:8], order)
    entries = int.from_bytes(tiff[start : start + 2], order)
    for at in range(start + 2, min(start + 2 + 12 * entries, len(tiff) - 11), 12):
        if int.from_bytes(tiff[at : at + 2], order) != _ORIENTATION:
            continue
        kind = int.from_bytes(tiff[at + 2 : at + 4], order)
        value = int.from_bytes(tiff[at + 8 : at + 10], order)
        return value if kind == 3 and 1 <= value <= 8 else None
    return None
