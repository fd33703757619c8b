"""Reading result pages: tables of Markdown, tags of HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from rotpred.report.build import page
from rotpred.report.page import Block, markdown
from rotpred.report.results import read_runs

Rows = list[dict[str, Any]]


def rows(values: Mapping[str, float], **extra: object) -> Rows:
    """Rows of results.json: one per metric."""
    return [{"metric": metric, "value": value, **extra} for metric, value in values.items()]


def blocks_of(*folders: Path) -> list[Block]:
    """The blocks of the page of these run folders."""
    return page([run for folder in folders for run in read_runs(folder)])


def tables(text: str) -> dict[str, list[dict[str, dict[str, str]]]]:
    """Tables of a Markdown page by heading: cells by first column and column title."""
    found: dict[str, list[dict[str, dict[str, str]]]] = {}
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        title = section.partition("\n")[0]
        for grid in re.findall(r"(?:^\|.*\n?)+", section, flags=re.M):
            head, _, *lines = (
                [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                for line in grid.splitlines()
            )
            cells = {line[0]: dict(zip(head[1:], line[1:], strict=True)) for line in lines}
            found.setdefault(title, []).append(cells)
    return found


def table(text: str, title: str, place: int = 0) -> dict[str, dict[str, str]]:
    """The table at this position under the one heading that starts with `title`."""
    (name,) = [name for name in tables(text) if name.startswith(title)]
    return tables(text)[name][place]


def rendered(*folders: Path) -> str:
    """The Markdown page of these run folders."""
    return markdown(blocks_of(*folders), folder=folders[0].parent)


class HtmlChecker(HTMLParser):
    """Checks that tags nest properly; collects text and images."""

    VOID = ("meta", "img")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[str] = []
        self.images: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(str(dict(attrs)["src"]))
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
