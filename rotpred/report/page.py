"""A page as a list of blocks, rendered as Markdown or as one self-contained HTML file."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

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
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
        case Text():
            start = '<p class="warning"><b>Warning:</b> ' if block.warning else "<p>"
            return f"{start}{escape(block.text)}</p>"
        case Code():
            return f"<pre><code>{escape(block.text)}</code></pre>"
        case Grid():
            head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in block.head)
            rows = "\n".join(_html_row(row) for row in block.rows)
            return (
                f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
                f"<tbody>\n{rows}\n</tbody>\n</table></div>"
            )
        case ImageBlock():
            data = base64.b64encode(block.png).decode()
            title = escape(block.title)
            return (
                f'<figure><img alt="{title}" src="data:image/png;base64,{data}">'
                f"<figcaption>{title}</figcaption></figure>"
            )


def _html_row(row: tuple[str, ...]) -> str:
    cells = [f'<th scope="row">{escape(row[0])}</th>']
    for cell in row[1:]:
        mark = ' class="missing"' if cell == NOT_RUN else ""
        cells.append(f"<td{mark}>{escape(cell)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
  max-width: 62rem; padding: 0 1rem 3rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ddd;
  padding-top: 1rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e4e4e4; text-align: right; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; min-width: 7rem; }
thead th { vertical-align: bottom; border-bottom: 2px solid #999; }
tbody th { font-weight: normal; }
.missing { color: #767676; font-style: italic; }
.warning { border-left: 4px solid #c8641e; background: #fdf3ec; padding: .5rem .8rem; }
pre { overflow-x: auto; background: #f5f5f5; padding: .6rem .8rem; font-size: .8rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
figcaption { font-size: .85rem; color: #555; }
"""
