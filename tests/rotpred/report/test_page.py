"""Pages as HTML and Markdown: escaping, embedded images, the gallery."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from rotpred.models.backbone import build_backbone
from rotpred.report.gallery import feature_gallery
from rotpred.report.page import Code, Heading, Text, html, markdown
from rotpred.weights.load import save_backbone
from tests.support.report_pages import HtmlChecker, blocks_of, rendered, rows, table

pytestmark = pytest.mark.timeout(120)


Make = Callable[..., Path]


def test_html_is_one_whole_file_whatever_runs_are_called(make_run: Make) -> None:
    evil = '<script>alert("x")</script>&amp;'
    recipe = "<img src=x onerror=alert(1)>"
    fields = {"backbone": "</table><b>"}
    trained = make_run("<b>&'\"", recipe, rows({f"top1|{evil}": 1.0}), weights=evil, fields=fields)
    text = html(blocks_of(trained), title="A & <B>")
    checker = HtmlChecker()
    checker.feed(text)
    checker.close()
    assert checker.open == [] and "script" not in checker.seen
    assert checker.seen.count("b") == 1  # "Warning:"
    for said in (recipe, f"top1|{evil}", "</table><b>", "<b>&'\": curves"):
        assert said in checker.text
    (source,) = checker.images
    kind, _, data = source.partition(",")
    assert kind == "data:image/png;base64"
    content = base64.b64decode(data, validate=True)
    assert content == (trained / "figures" / "curves.png").read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert image.format == "PNG"
    assert 'name="viewport"' in text and not re.search(r'(?:src|href)="(?!data:)', text)


def test_markdown_shows_what_is_in_the_runs(make_run: Make) -> None:
    nasty = "a|b *c* <d> `e`\n# f"
    text = markdown([Heading(nasty, 2), Code("```\nls")], folder=Path())
    assert text == "## a\\|b \\*c\\* \\<d\\> \\`e\\` \\# f\n\n````\n```\nls\n````\n"
    trained = make_run("run", "own|recipe", rows({"top1|x": 3.0}))
    assert table(rendered(trained), "own\\|recipe")["top1\\|x"]["trained"] == "3.00"


def test_gallery_of_a_small_network(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    weights = tmp_path / "backbone.safetensors"
    save_backbone(weights, build_backbone("resnet18_tiny"), {})
    blocks = feature_gallery(str(weights), str(folder), stage="res3", samples=20)
    assert isinstance(blocks[1], Text) and "resnet18_tiny" in blocks[1].text
    text = html(blocks, title="")
    checker = HtmlChecker()
    checker.feed(text)
    assert len(checker.images) == 3
    for source in checker.images:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            assert image.format == "PNG" and len(set(image.convert("L").tobytes())) > 20
    with pytest.raises(ValueError, match=r"needs an \.html page"):
        markdown(blocks, folder=tmp_path)
    with pytest.raises(ValueError, match="give --backbone"):
        feature_gallery("random", str(folder))
    with pytest.raises(ValueError, match="no stage conv9"):
        feature_gallery(str(weights), str(folder), stage="conv9")
    with pytest.raises(ValueError, match="has 4 images"):
        feature_gallery(str(weights), str(folder), samples=4)
