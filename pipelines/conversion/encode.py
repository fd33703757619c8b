"""Encoding of one image for a beton: its own JPEG bytes if possible, re-encoded if not."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Annotated, Literal, NamedTuple

import numpy as np
from PIL import Image

from pipelines.arrays import Uint8
from pipelines.checks import Checked, at_least, at_most
from pipelines.imaging.decode import ImageError, decode_rgb, inspect, jpeg_header
from pipelines.jpeg.markers import JpegHeader, read_header
from pipelines.jpeg.restart_markers import RestartLayout, insert_restart_markers
from pipelines.jpeg.scan import Scan, walk_scan

Check = Literal["scan", "header"]

PASSED = "passed"
"""`PreparedImage.kind` of images stored unchanged."""

_EXACT_QUALITY = 95
_MAX_JPEG_SIDE = 65_500  # libjpeg's limit.
Side = Annotated[int, at_least(1), at_most(_MAX_JPEG_SIDE)]


@dataclass(frozen=True)
class Options(Checked):
    """Options of how images are stored."""

    max_side: Side | None = None
    """Largest side in pixels. Larger images are shrunk. None keeps all sizes."""
    short_side: Side | None = None
    """Largest short side in pixels. Larger images are shrunk. None keeps all sizes."""
    quality: Annotated[int, at_least(1), at_most(100)] = 90
    """JPEG quality of shrunk images. Others that are re-encoded get 95, without subsampling."""
    check: Check = "scan"
    """scan follows every Huffman code of a JPEG stream. header reads markers only, which finds
    truncation but not damage."""
    restart_markers: bool = True
    """Insert restart markers into baseline JPEG streams, so that a crop can be decoded without the
    rest of its image. This walks the streams, whatever `check` is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_side is not None and self.short_side is not None:
            raise ValueError("give max_side or short_side, not both")

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width at which an upright image is stored.

        Never larger than the image, never below 1.
        """
        if self.max_side is not None:
            scale = self.max_side / max(height, width)
        elif self.short_side is not None:
            scale = self.short_side / min(height, width)
        else:
            scale = 1.0
        if scale >= 1:
            return height, width
        return max(1, round(height * scale)), max(1, round(width * scale))


class PreparedImage(NamedTuple):
    """One image, ready to be stored."""

    data: bytes
    """A JPEG stream that all decoders read alike."""
    height: int
    """Height in pixels."""
    width: int
    """Width in pixels."""
    kind: str
    """`PASSED`, or the reason for re-encoding it."""
    cuts: RestartLayout | None = None
    """Where the stream can be cut; None without restart markers."""
    uncut: str | None = None
    """Reason why requested restart markers are missing."""
    added: int = 0
    """Bytes that restart markers added."""


def prepare(image: bytes | Uint8, *, options: Options) -> PreparedImage:
    """Check one image and encode it for storage.

    A JPEG stream keeps all its coefficients, unless it is shrunk, rotated by Exif, not 8-bit grey
    or RGB, arithmetic-coded, or unusual in a way that FFCV's decoder rejects. Without restart
    markers it keeps its bytes, too, except those after its end.

    Args:
        image: Bytes of a file, also as uint8 (bytes,), or upright pixels, uint8 (H, W, 3).
        options: How to store it.

    Returns:
        The JPEG stream to store.

    Raises:
        ImageError: It is not a usable image.
    """
    if not isinstance(image, bytes):
        if image.ndim == 3:
            return _encode(image, "array", options)
        image = image.tobytes()
    header = jpeg_header(image)
    if header is None:
        return _encode(decode_rgb(image), "format", options)
    walked = options.check == "scan" or options.restart_markers
    scan = walk_scan(image, header) if walked else None
    if scan is None:
        header = read_header(image, whole=True)
    reason = _needs_encoding(header, scan, options)
    if reason is not None:
        return _encode(decode_rgb(image), reason, options)
    if scan is None and options.check == "scan":
        fault = inspect(image, header)
        if fault is not None:
            raise ImageError(fault)
    end = header.end if scan is None else scan.end
    plain = PreparedImage(image[:end], header.height, header.width, PASSED)
    return _cut(plain, header, scan) if options.restart_markers else plain


def compile_encoder() -> None:
    """Compile the kernels, so that processes forked later need not compile or load them."""
    image = np.zeros((8, 8, 3), np.uint8)
    _encode(image, "array", Options())


def _cut(plain: PreparedImage, header: JpegHeader, scan: Scan | None) -> PreparedImage:
    """Insert restart markers, or record why that is not possible."""
    found = None if scan is None else insert_restart_markers(plain.data, scan)
    if found is None:
        return plain._replace(uncut="progressive" if header.progressive else "unusual")
    data, cuts = found
    return plain._replace(data=data, cuts=cuts, added=len(data) - len(plain.data))


def _needs_encoding(header: JpegHeader, scan: Scan | None, options: Options) -> str | None:
    """Return the reason why the stream must be re-encoded, or None."""
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
    return "cleaned" if header.warning or (scan is not None and scan.spare) else None


def _encode(pixels: Uint8, reason: str, options: Options) -> PreparedImage:
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
    plain = PreparedImage(out.getvalue(), target[0], target[1], reason)
    if not options.restart_markers:
        return plain
    header = read_header(plain.data)
    return _cut(plain, header, walk_scan(plain.data, header))
