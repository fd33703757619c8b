"""A page as a list of blocks, rendered as Markdown or as one self-contained HTML file."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

NOT_RUN = "not run"
"""Text of a cell whose evaluation is not among the runs."""


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 (page title) to 3."""

    text: str
    level: int


@dataclass(frozen=True)
class Text:
    """A paragraph; a warning is highlighted."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Code:
    """A block of shell commands."""

    text: str


@dataclass(frozen=True)
class Grid:
    """A table; rows are as long as the head."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ImageBlock:
    """A PNG image, and its path if it is a file."""

    title: str
    png: bytes
    path: Path | None = None

    @property
    def base64(self) -> str:
        """The PNG in base64, for a data URI."""
        return base64.b64encode(self.png).decode()


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode an image, uint8 (height, width, 3), as PNG; equal pixels give equal bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return file.getvalue()


Block = Heading | Text | Code | Grid | ImageBlock


def markdown(blocks: Sequence[Block], *, folder: Path) -> str:
    """Render GitHub's Markdown; images are links, relative to the page's folder.

    Raises:
        ValueError: An image has no file to link to.
    """
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_escaped(block.text)}"
        case Text():
            return ("> **Warning:** " if block.warning else "") + _escaped(block.text)
        case Code():
            # Longer than any fence in the text, so that the text cannot end the block.
            longest = max((len(run) for run in re.findall("`+", block.text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}\n{block.text}\n{fence}"
        case Grid():
            rows = (block.head, ("---",) * len(block.head), *block.rows)
            lines = [[c if c == "---" else _escaped(c) for c in row] for row in rows]
            return "\n".join(f"| {' | '.join(row)} |" for row in lines)
        case ImageBlock():
            if block.path is None:
                raise ValueError(f"{block.title}: an image without a file needs an .html page")
            link = os.path.relpath(block.path.resolve(), folder.resolve())
            return f"![{_escaped(block.title)}]({quote(link)})"


def _escaped(text: str) -> str:
    """Escape text for Markdown, on one line."""
    return re.sub(r"([\\`*<>\[\]|#])", r"\\\1", " ".join(text.split()))


def html(blocks: Sequence[Block], *, title: str) -> str:
    """Render one self-contained HTML file: images are data URIs, the style is inline."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    named = [(type(block).__name__, block) for block in blocks]
    return templates.get_template("page.html").render(title=title, blocks=named, not_run=NOT_RUN)
