"""One image as it will be stored: its own JPEG bytes where possible, encoded anew where not."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.imaging.decode import ImageError, check_size, decode_rgb, inspect
from pipelines.jpeg.markers import JpegError, JpegHeader, read_header
from pipelines.jpeg.restart_markers import RestartLayout, with_restarts
from pipelines.jpeg.scan import Scan, walk_scan

Check = Literal["scan", "header"]

PASSED = "passed"
"""`Prepared.kind` of images stored as they were."""

_EXACT_QUALITY = 95
_MAX_JPEG_SIDE = 65_500  # libjpeg's limit.


@dataclass(frozen=True)
class Options:
    """How images are stored."""

    max_side: int | None = None
    """Longest side in pixels; longer ones are shrunk. None keeps all sizes."""
    short_side: int | None = None
    """Length in pixels that a longer short side is shrunk to. None keeps all sizes."""
    quality: int = 90
    """JPEG quality of shrunk images; others that must be encoded take 95 without subsampling."""
    check: Check = "scan"
    """scan follows every code of a JPEG stream's pixels; header reads markers only, which finds
    truncation but not damage."""
    restart_markers: bool = True
    """Put restart markers into baseline JPEG streams, so that a crop can be decoded without the
    rest of its image. They are walked for it whatever `check` says."""

    def __post_init__(self) -> None:
        if self.max_side is not None and self.short_side is not None:
            raise ValueError("give max_side or short_side, not both")
        for name in ("max_side", "short_side"):
            side = getattr(self, name)
            if side is not None and not 1 <= side <= _MAX_JPEG_SIDE:
                raise ValueError(f"{name} must be in 1..{_MAX_JPEG_SIDE}, got {side}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be in 1..100, got {self.quality}")
        if self.check not in ("scan", "header"):
            raise ValueError(f"check must be 'scan' or 'header', got {self.check!r}")

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to store an upright image at: never larger, never below 1."""
        if self.max_side is not None:
            scale = self.max_side / max(height, width)
        elif self.short_side is not None:
            scale = self.short_side / min(height, width)
        else:
            scale = 1.0
        if scale >= 1:
            return height, width
        return max(1, round(height * scale)), max(1, round(width * scale))


class Prepared(NamedTuple):
    """One image, ready to be stored."""

    data: bytes
    """A JPEG stream that every decoder reads alike."""
    height: int
    """Rows."""
    width: int
    """Columns."""
    kind: str
    """`PASSED`, or why it was encoded anew."""
    cuts: RestartLayout | None = None
    """Where it can be cut; None without restart markers."""
    uncut: str | None = None
    """Why it has no restart markers where they were asked for."""
    added: int = 0
    """Bytes that restart markers added."""


def prepare(image: bytes | npt.NDArray[np.uint8], *, options: Options) -> Prepared:
    """Check one image and bring it into the form that is stored.

    A JPEG stream passes with all its coefficients, unless it is shrunk, turned by Exif, not 8-bit
    grey or RGB, arithmetic-coded, or odd in a way that FFCV's decoder rejects. Without restart
    markers its bytes pass too, but for those behind its end.

    Args:
        image: A file's bytes, or upright pixels (H, W, 3).
        options: How to store it.

    Raises:
        ImageError: It is no usable image.
    """
    if not isinstance(image, bytes):
        return _encode(image, "array", options)
    if image[:2] != b"\xff\xd8":
        return _encode(decode_rgb(image), "format", options)
    try:
        header = read_header(image)
        check_size(header.width, header.height)
        walked = options.check == "scan" or options.restart_markers
        scan = walk_scan(image, header) if walked else None
        if scan is None:
            header = read_header(image, whole=True)
    except JpegError as error:
        raise ImageError(str(error)) from error
    reason = _needs_encoding(header, scan, options)
    if reason is not None:
        return _encode(decode_rgb(image), reason, options)
    if scan is None and options.check == "scan":
        fault = inspect(image, header=header)
        if fault is not None:
            raise ImageError(fault)
    end = header.end if scan is None else scan.end
    plain = Prepared(image[:end], header.height, header.width, PASSED)
    return _cut(plain, header, scan) if options.restart_markers else plain


def compile_encoder() -> None:
    """Have the compiled parts ready, so that processes forked later need not make or load them."""
    image = np.zeros((8, 8, 3), np.uint8)
    _encode(image, "array", Options())


def _cut(plain: Prepared, header: JpegHeader, scan: Scan | None) -> Prepared:
    """The same image with restart markers, or why it has none."""
    found = None if scan is None else with_restarts(plain.data, scan)
    if found is None:
        return plain._replace(uncut="progressive" if header.progressive else "unusual")
    data, cuts = found
    return plain._replace(data=data, cuts=cuts, added=len(data) - len(plain.data))


def _needs_encoding(header: JpegHeader, scan: Scan | None, options: Options) -> str | None:
    """Why the stream cannot be stored as it is; None where it can."""
    if options.target(*header.upright) != header.upright:
        return "resized"
    if header.orientation != 1:
        return "orientation"
    if header.components not in (1, 3):
        return "cmyk" if header.components == 4 else "components"
    if header.precision != 8 or header.lossless:
        return "precision"
    if header.arithmetic:
        return "arithmetic"
    return "cleaned" if header.odd or (scan is not None and scan.spare) else None


def _encode(pixels: npt.NDArray[np.uint8], reason: str, options: Options) -> Prepared:
    height, width = pixels.shape[:2]
    target = options.target(height, width)
    image = Image.fromarray(pixels)
    if target != (height, width):
        reason = "resized"
        image = image.resize((target[1], target[0]), Image.Resampling.BICUBIC)
    if max(target) > _MAX_JPEG_SIDE:
        raise ImageError(f"a side of {max(target)} pixels is more than JPEG's {_MAX_JPEG_SIDE}")
    out = BytesIO()
    if reason == "resized":
        image.save(out, "JPEG", quality=options.quality)
    else:
        image.save(out, "JPEG", quality=_EXACT_QUALITY, subsampling=0)
    plain = Prepared(out.getvalue(), target[0], target[1], reason)
    if not options.restart_markers:
        return plain
    header = read_header(plain.data)
    return _cut(plain, header, walk_scan(plain.data, header))
