"""Objects of a PASCAL VOC annotation file (XML): class, box and flags, with line numbers."""

from __future__ import annotations

from collections.abc import Sequence
from xml.parsers import expat

from pipelines.datasets.annotations import clip

_CORNERS = ("bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax")
_FIELDS = frozenset(("name", "difficult", *_CORNERS))


class XmlError(ValueError):
    """A file is not a valid annotation. The message says why; `line` says where."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


Fields = dict[str, tuple[int, str]]
"""An object: line number and text by path of the XML element. The key "" is the object itself."""


def read_xml(data: bytes) -> list[Fields]:
    """Parse the objects of an annotation file.

    Raises:
        XmlError: The file is damaged, is not an annotation, or declares a document type, whose
            entities could expand a small file to gigabytes.
    """
    parser = expat.ParserCreate()
    path: list[str] = []
    lines: list[int] = []
    text: list[str] = []
    found: list[Fields] = []

    def start(tag: str, _attributes: object) -> None:
        path.append(tag)
        lines.append(parser.CurrentLineNumber)
        text.clear()
        if path[0] != "annotation":
            raise XmlError(lines[0], f"<{tag}> where <annotation> was expected")
        if path == ["annotation", "object"]:
            found.append({"": (lines[-1], "")})

    def end(_tag: str) -> None:
        field = "/".join(path[2:])
        if path[:2] == ["annotation", "object"] and field in _FIELDS:
            found[-1].setdefault(field, (lines[-1], "".join(text).strip()))
        path.pop()
        lines.pop()
        text.clear()

    def refuse(*_declaration: object) -> None:
        raise XmlError(parser.CurrentLineNumber, "document type declarations are not allowed")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = text.append, refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise XmlError(
            error.lineno, f"not valid XML: {expat.errors.messages[error.code]}"
        ) from error
    return found


def parse_object(
    entry: Fields, classes: Sequence[str], height: int, width: int
) -> tuple[tuple[float, float, float, float], int, bool, bool]:
    """Return box, label, difficult and crowd of an object.

    Args:
        entry: From `read_xml`.
        classes: Class names; a label is an index into them.
        height: Of the image, in pixels.
        width: Of the image, in pixels.

    Returns:
        (left, top, right, bottom) from 0, right and bottom exclusive; label; difficult; crowd.

    Raises:
        XmlError: The class is unknown, a number or flag is malformed, or the box is invalid.
    """
    at = entry[""][0]
    line, name = entry.get("name", (at, ""))
    if name not in classes:
        raise XmlError(line, f"class {name!r} is none of the {len(classes)} classes")
    values = []
    for corner in _CORNERS:
        line, text = entry.get(corner, (at, ""))
        try:
            values.append(float(text))
        except ValueError as error:
            what = f"expected a number in <{corner.rpartition('/')[2]}>, found {text[:50]!r}"
            raise XmlError(line, what) from error
    left, top, right, bottom = values
    try:
        box = clip(left - 1, top - 1, right, bottom, height=height, width=width)
    except ValueError as error:
        raise XmlError(entry[_CORNERS[0]][0], str(error)) from error
    line, flag = entry.get("difficult", (at, "0"))
    if flag not in ("", "0", "1"):
        raise XmlError(line, f"expected 0 or 1 in <difficult>, found {flag[:50]!r}")
    return box, classes.index(name), flag == "1", False
