"""Draw docs/imports.svg and the tables of sub-packages in docs/architecture.md from the imports.

Usage:

    python scripts/draw_imports.py            # or: make docs
    python scripts/draw_imports.py --check    # status 1 if the committed files are out of date
"""

from __future__ import annotations

import argparse
import ast
import configparser
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import grimp
import networkx

ROOT = Path(__file__).resolve().parents[1]
PAGE, IMAGE = ROOT / "docs/architecture.md", ROOT / "docs/imports.svg"
MARKS = (
    "<!-- sub-packages: made by scripts/draw_imports.py -->\n",
    "<!-- end of sub-packages -->\n",
)
PACKAGES = ("pipelines", "rotpred")

BOX, GAP, ROW = (118, 30), 14, 74
MARGIN = 24

Edges = Mapping[str, frozenset[str]]


@functools.cache
def imports(package: str) -> Edges:
    """Return the direct imports between the sub-packages and top modules of a package, by name."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    children = graph.find_children(package)
    for child in children:
        graph.squash_module(child)
    return {
        child.partition(".")[2]: frozenset(
            found.partition(".")[2]
            for found in graph.find_modules_directly_imported_by(child)
            if found in children
        )
        for child in children
    }


def layers(package: str) -> list[list[str]]:
    """Return the layers of the import contract in setup.cfg, from the top."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config[f"importlinter:contract:{package}"]["layers"].split("\n")
    return [re.split(r"\s*[|:]\s*", line.strip()) for line in lines if line.strip()]


def needed(edges: Edges) -> Edges:
    """Return the transitive reduction: the edges that no longer path implies."""
    reduced = networkx.transitive_reduction(networkx.DiGraph(edges))
    return {name: frozenset(reduced[name]) for name in edges}


def drawing() -> str:
    """Return the diagram of both packages as SVG."""
    plans = [(package, layers(package), needed(imports(package))) for package in PACKAGES]
    widest = [max(len(row) for row in rows) * (BOX[0] + GAP) - GAP for _, rows, _ in plans]
    width = sum(widest) + 5 * MARGIN
    height = max(len(rows) for _, rows, _ in plans) * ROW + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
        'markerHeight="6" orient="auto"><path d="M0 0L8 4L0 8z" fill="#667"/></marker></defs>',
    ]
    left = MARGIN
    for (package, rows, edges), span in zip(plans, widest, strict=True):
        parts += _package(package, rows, edges, left, span)
        left += span + 3 * MARGIN
    return "\n".join((*parts, "</svg>", ""))


def _package(
    package: str, rows: Sequence[Sequence[str]], edges: Edges, left: int, span: int
) -> list[str]:
    places: dict[str, tuple[float, float]] = {}
    for i, row in enumerate(rows):
        first = left + (span - len(row) * (BOX[0] + GAP) + GAP) / 2
        for k, name in enumerate(row):
            places[name] = (first + k * (BOX[0] + GAP), 2 * MARGIN + i * ROW)
    parts = [
        f'<text x="{left + span / 2:g}" y="{MARGIN}" text-anchor="middle" font-weight="bold" '
        f'font-size="16">{escape(package)}</text>'
    ]
    for name in sorted(edges):
        x, y = places[name]
        for target in sorted(edges[name]):
            tx, ty = places[target]
            parts.append(_arrow(x + BOX[0] / 2, y, tx + BOX[0] / 2, ty))
    for name, (x, y) in places.items():
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{BOX[0]}" height="{BOX[1]}" rx="5" '
            f'fill="#e8eef7" stroke="#4a6fa5"/><text x="{x + BOX[0] / 2:g}" y="{y + 20:g}" '
            f'text-anchor="middle">{escape(name)}</text>'
        )
    return parts


def _arrow(x: float, y: float, tx: float, ty: float) -> str:
    style = 'fill="none" stroke="#667" stroke-opacity="0.75" marker-end="url(#tip)"'
    if y == ty:  # neighbours of one layer
        side = BOX[0] / 2 if tx > x else -BOX[0] / 2
        middle = y + BOX[1] / 2
        return f'<path d="M{x + side:g} {middle:g}L{tx - side:g} {middle:g}" {style}/>'
    begin, bend = y + BOX[1], (ty - y - BOX[1]) / 2
    path = f"M{x:g} {begin:g}C{x:g} {begin + bend:g} {tx:g} {ty - bend:g} {tx:g} {ty:g}"
    return f'<path d="{path}" {style}/>'


def table() -> str:
    """Return the sub-packages of both packages as Markdown: purpose, and what each imports."""
    lines = []
    for package in PACKAGES:
        edges = imports(package)
        lines += [f"| `{package}` | purpose | imports |", "|---|---|---|"]
        for row in layers(package):
            for name in row:
                imported = ", ".join(sorted(edges[name])) or "–"
                lines.append(f"| `{name}` | {_purpose(package, name)} | {imported} |")
        lines.append("")
    return "\n".join(lines)


def _purpose(package: str, name: str) -> str:
    path = ROOT / package / name
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(source.read_text()))
    if not text:
        raise ValueError(f"{source} has no docstring")
    return text.partition("\n")[0].rstrip(".").replace("|", "\\|")


def page(text: str) -> str:
    """Return docs/architecture.md with the new table between its marks.

    Raises:
        ValueError: The marks are missing.
    """
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise ValueError(f"{PAGE} lacks the lines {' and '.join(map(str.strip, MARKS))}")
    return f"{before}{mark}\n{table()}{end}{after}"


def main() -> int:
    """Write or check both files; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args().check
    made = {IMAGE: drawing(), PAGE: page(PAGE.read_text())}
    old = [file for file, text in made.items() if not file.exists() or file.read_text() != text]
    for file in old:
        if check:
            print(f"{file.relative_to(ROOT)} is out of date: make docs", file=sys.stderr)
        else:
            file.write_text(made[file])
            print(f"wrote {file.relative_to(ROOT)}")
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
