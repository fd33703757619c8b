"""The page of the method: every cell from rows as runs write them, and what images show."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from rotpred.files import write_json
from rotpred.models.backbone import build_backbone
from rotpred.plots import features as feature_plots
from rotpred.records.log import RunLog
from rotpred.report import published
from rotpred.report.build import page
from rotpred.report.gallery import showcase
from rotpred.report.page import NOT_RUN, Block, Code, Heading, Text, html, markdown
from rotpred.report.recipe_changes import PROCESSES
from rotpred.report.results import read_runs
from rotpred.weights.load import save_backbone

pytestmark = pytest.mark.timeout(120)

SCRIPT = Path(__file__).parents[3] / "scripts" / "report.py"

Rows = list[dict[str, Any]]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Write a run folder with the real log: rows as the runners give them."""

    def write(
        name: str,
        recipe: str,
        rows: Rows,
        *,
        weights: str | None = "runs/x/backbone.safetensors",
        world: int | None = None,
        fields: Mapping[str, object] | None = None,
        done: bool = True,
    ) -> Path:
        words = ["scripts/evaluate.py", recipe] + (["--weights", weights] if weights else [])
        monkeypatch.setattr(sys, "argv", words)
        git = {"revision": "0123456789abcdef", "dirty": True}
        monkeypatch.setattr("rotpred.records.folder.git_state", lambda _: git)
        about = {"name": recipe, "weights": weights, "backbone": "resnet50", **(fields or {})}
        out = tmp_path / name
        log = RunLog(
            out, recipe=Named(recipe), rank_main=True, total_steps=1, device="cpu",
            world=world or PROCESSES.get(recipe, 2),
        )  # fmt: skip
        with log:
            for row in rows:
                extra = {} if weights is None else {"weights": Path(weights).name}
                random = weights in (None, "random")
                sha = None if random else "ab" * 32
                row = {"benchmark": recipe, "unit": "%", "n": 400, "checkpoint_sha256": sha} | row
                log.result(row.pop("benchmark"), **extra, **row)
            log.figure("curves", Figure(figsize=(1, 1)))
        write_json(out / "recipe.json", about)
        if done:
            write_json(out / "done.json", {})
        return out

    return write


class Named:
    """As much of a recipe as a log asks for."""

    def __init__(self, name: str) -> None:
        self.name = name


def rows(values: Mapping[str, float], **extra: object) -> Rows:
    return [{"metric": metric, "value": value, **extra} for metric, value in values.items()]


def blocks_of(*folders: Path) -> list[Block]:
    return page([run for folder in folders for run in read_runs(folder)])


def tables(text: str) -> dict[str, list[dict[str, dict[str, str]]]]:
    """The tables of a Markdown page by heading: cells by first column and head."""
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
    (name,) = [name for name in tables(text) if name.startswith(title)]
    return tables(text)[name][place]


def rendered(*folders: Path) -> str:
    return markdown(blocks_of(*folders), folder=folders[0].parent)


def test_published_numbers_are_those_of_the_sources() -> None:
    def number(title: str, cell: str, source: str) -> str:
        (one,) = [t for t in published.TABLES if t.title.startswith(title)]
        (row,) = [c for c in one.cells if c.name == cell]
        return {s.name: text for s, text in row.published.items()}[source]

    zoo, mm = "OpenSelfSup", "mmselfsup"
    for title, cell, source, expected in (
        ("VOC07 classification, linear SVM", "best of Feature1-5", mm, "67.70"),
        ("VOC07 classification, low-shot", "Feature4 (res4), k = 1", mm, "20.60"),
        ("VOC07 classification, low-shot", "Feature4 (res4), k = 96", mm, "62.42"),
        ("VOC07 classification, low-shot", "Feature4 (res4), k = 96", zoo, "61.11"),
        ("ImageNet-1k, linear", "Feature1 (stem)", mm, "12.15"),
        ("ImageNet-1k, linear", "Feature4 (res4)", mm, "54.20"),
        ("ImageNet-1k, linear", "AvgPool", mm, "47.0"),
        ("ImageNet-1k, linear", "AvgPool", f"{zoo}, random", "4.35"),
        ("ImageNet-1k, linear", "Feature5 (res5)", f"{zoo}, supervised", "76.17"),
        ("Places205", "Feature4 (res4)", mm, "46.30"),
        ("ImageNet-1k, semi", "1 %, top-1", zoo, "18.98"),
        ("ImageNet-1k, semi", "1 %, top-5", zoo, "44.05"),
        ("ImageNet-1k, semi", "10 %, top-1", f"{zoo}, random", "21.78"),
        ("ImageNet-1k, weighted", "k = 100", mm, "12.6"),
        ("VOC07+12", "AP50", mm, "79.67"),
        ("VOC07+12", "AP75", zoo, "61.39"),
        ("COCO", "box AP", mm, "37.9"),
        ("COCO", "mask AP75", mm, "36.7"),
        ("COCO", "mask AP50", f"{zoo}, C4 2x", "56.0"),
        ("VOC12+Aug", "mIoU", mm, "64.31"),
        ("CIFAR-10, probes", "conv2, non-linear", "paper", "89.06"),
    ):
        assert number(title, cell, source) == expected, (title, cell, source)


def test_stages_and_average_pool_of_two_recipes_fill_one_table(make: Make) -> None:
    stages = {"top1/stem": 10.5, "top1/res4": 55.25, "top5/res4": 78.0}
    trained = make("mhead", "in1k_mhead", rows(stages))
    pool = make("pool", "in1k_linear", rows({"top1/avgpool": 46.9}))
    control = {"top1/stem": 11.0, "top1/res4": 9.125}
    random = make("random", "in1k_mhead", rows(control), weights="random")
    text = rendered(trained, pool, random)
    cells = table(text, "ImageNet-1k, linear")
    assert cells["Feature1 (stem)"] == {
        "trained": "10.50", "random": "11.00", "difference": "-0.50", "mmselfsup": "12.15",
        "OpenSelfSup": "12.89", "OpenSelfSup, random": "11.37", "OpenSelfSup, supervised": "15.18",
    }  # fmt: skip
    assert [*cells["Feature4 (res4)"].values()][:4] == ["55.25", "9.12", "+46.12", "54.20"]
    assert [*cells["Feature5 (res5)"].values()][:3] == [NOT_RUN, NOT_RUN, "–"]
    assert [*cells["AvgPool"].values()][:4] == ["46.90", NOT_RUN, "–", "47.0"]
    assert table(text, "ImageNet-1k, linear", 1) == {
        "top5/res4": {"trained": "78.00", "random": NOT_RUN, "difference": "–"}
    }
    section = text.partition("## ImageNet-1k, linear")[2].partition("\n## ")[0]
    assert "Config: in1k\\_linear" not in section and "Config: in1k_linear, in1k_mhead" in section
    commands = section.partition("```\n")[2].partition("\n```")[0].splitlines()
    start = "torchrun --standalone --nproc-per-node"
    assert commands == [
        "# trained: pool",
        f"{start} 8 scripts/evaluate.py in1k_linear --weights runs/x/backbone.safetensors",
        "# trained: mhead",
        f"{start} 8 scripts/evaluate.py in1k_mhead --weights runs/x/backbone.safetensors",
        "# random: not run",
        f"{start} 8 scripts/evaluate.py in1k_linear --weights random",
        "# random: random",
        f"{start} 8 scripts/evaluate.py in1k_mhead --weights random",
    ]
    assert "three checkpoints" in text and "48.12" in text
    runs = table(text, "Runs")
    assert runs["mhead"]["weights (sha256)"] == "backbone.safetensors abababababab"
    assert runs["random"]["weights (sha256)"] == "random"
    assert (runs["pool"]["processes"], runs["pool"]["revision"]) == ("8", "0123456789ab + changes")


def test_frozen_runners_rows(make: Make) -> None:
    """SVM with both kinds of AP, low-shot with its deviation, nearest neighbours."""
    svm = {"mAP/res3": 50.0, "mAP/res4": 66.5, "mAP/avgpool": 70.0, "mAP11/res4": 65.125}
    shots = [
        {"metric": f"mAP/res4/k={k}", "value": value, "deviation": 0.345, "cost": 1.0, "draws": 5}
        for k, value in ((1, 21.5), (96, 60.0))
    ]
    text = rendered(
        make("svm", "voc07_svm", rows(svm)),
        make("shots", "voc07_lowshot", shots),
        make("knn", "in1k_knn", rows({"top1/k=20": 12.0, "top5/k=20": 30.0}), weights="random"),
    )
    cells = table(text, "VOC07 classification, linear SVM")
    assert cells["best of Feature1-5"]["trained"] == "66.50 (res4)"  # not the average pool
    assert cells["best of Feature1-5, 11-point AP"]["trained"] == "65.12 (res4)"
    assert cells["Feature3 (res3)"]["trained"] == "50.00"
    assert cells["AvgPool"] | {"trained": "70.00"} == cells["AvgPool"]
    cells = table(text, "VOC07 classification, low-shot")
    assert cells["Feature4 (res4), k = 1"]["trained"] == "21.50 ± 0.34"
    assert cells["Feature4 (res4), k = 96"]["mmselfsup"] == "62.42"
    cells = table(text, "ImageNet-1k, weighted")
    assert cells["k = 20"] == {
        "trained": NOT_RUN, "random": "12.00", "difference": "–", "mmselfsup": "11.9"
    }  # fmt: skip


def test_grid_of_fine_tuning_reports_its_best_and_all_points(make: Make) -> None:
    points = [((0.1, 1.0), 15.0), ((0.01, 100.0), 19.5)]
    grid = [
        {"metric": f"top1/lr={lr:g},head={mult:g}", "value": value, "fraction": 0.01, "lr": lr,
         "head_lr_mult": mult, "best": value == 19.5}
        for (lr, mult), value in points
    ]  # fmt: skip
    best = {"fraction": 0.01, "lr": 0.01, "head_lr_mult": 100.0, "chosen_from": 2}
    grid += rows({"top1": 19.5, "top5": 44.0}, **best)
    # A grid has no done.json of its own: its points have, and its last row says that it ended.
    semi = make("semi", "in1k_semi_1", grid, fields={"grid": True}, done=False)
    text = rendered(semi)
    cells = table(text, "ImageNet-1k, semi")
    assert cells["1 %, top-1"]["trained"] == "19.50 (lr 0.01, head_lr_mult 100.0, best of 2)"
    assert cells["1 %, top-5"]["OpenSelfSup"] == "44.05"
    assert cells["10 %, top-1"]["trained"] == NOT_RUN
    rest = table(text, "ImageNet-1k, semi", 1)
    assert {name: row["trained"] for name, row in rest.items()} == {
        "top1/lr=0.1,head=1": "15.00", "top1/lr=0.01,head=100": "19.50"
    }  # fmt: skip
    assert "4 scripts/evaluate.py in1k_semi_10 --grid --weights FILE" in text
    half = make("half", "in1k_semi_1", grid[:2], fields={"grid": True}, done=False)
    with pytest.raises(ValueError, match="unfinished"):
        read_runs(half)


def test_the_best_of_a_grid_is_one_row_whichever_point_it_is(make: Make) -> None:
    for metric, recipe, title in (
        ("top1", "cifar10_semi_1", "CIFAR-10, fine-tuning on 1 %"),
        ("top1/res2", "cifar10_linear", "CIFAR-10, linear classifiers"),
    ):
        chosen = [
            make(f"{recipe}-{weights}", recipe, rows({metric: value}, lr=lr, chosen_from=3),
                 weights=weights, fields={"backbone": "resnet18_tiny"})
            for weights, value, lr in (("weights.safetensors", 45.0, 0.01), ("random", 38.5, 0.1))
        ]  # fmt: skip
        assert table(rendered(*chosen), title) == {
            metric: {
                "trained": "45.00 (lr 0.01, best of 3)",
                "random": "38.50 (lr 0.1, best of 3)",
                "difference": "+6.50",
            }
        }


def test_detection_and_segmentation_rows(make: Make) -> None:
    text = rendered(
        make("voc", "voc0712_det", rows({"AP50": 79.0, "AP": 54.0, "AP75": 60.0})),
        make("coco", "coco_det", rows({"box/AP": 37.0, "mask/AP75": 36.0})),
        make("seg", "voc12aug_seg", rows({"mIoU": 64.0})),
        make("city", "cityscapes_seg", rows({"mIoU": 70.0}), weights="imagenet"),
    )
    assert table(text, "VOC07+12")["AP50"]["trained"] == "79.00"
    assert table(text, "COCO")["box AP"]["trained"] == "37.00"
    assert table(text, "COCO")["mask AP75"]["trained"] == "36.00"
    assert table(text, "VOC12+Aug")["mIoU"] == {
        "trained": "64.00", "random": NOT_RUN, "difference": "–", "mmselfsup": "64.31"
    }  # fmt: skip
    assert table(text, "Cityscapes")["mIoU"]["supervised"] == "70.00"


def test_other_data_sets_and_protocols_follow_as_they_are(make: Make) -> None:
    values = {"top1/avgpool": 44.0, "top1/res2": 64.0}
    cached = rows(values, protocol="features of the validation crop")
    own = {"backbone": "resnet18_tiny"}
    trained = make("trained", "cifar10_linear", cached, fields=own)
    scores = rows({"top1/res2": 55.5})
    random = make("random", "cifar10_linear", scores, weights="random", fields=own)
    rotation = {"benchmark": "rotation", "metric": "accuracy", "value": 74.5, "chance": 25.0}
    pretext = make("pretrain", "rotnet_cifar10_r18", [rotation], weights=None, fields=own)
    text = rendered(trained, random, pretext)
    assert table(text, "CIFAR-10, linear") == {
        "top1/avgpool": {"trained": "44.00†", "random": NOT_RUN, "difference": "–"},
        "top1/res2": {"trained": "64.00†", "random": "55.50", "difference": "+8.50"},
    }
    assert "†: features of the validation crop." in text
    assert table(text, "Rotation prediction")["pretrain"]["accuracy"] == "74.50"
    # What was run stands before what was not.
    assert text.index("## CIFAR-10, linear") < text.index("## ImageNet-1k, linear")
    assert "![trained: curves](trained/figures/curves.png)" in text


def test_the_same_result_twice_is_an_error(make: Make) -> None:
    folders = [make(name, "in1k_knn", rows({"top1/k=10": 11.0})) for name in ("one", "two")]
    with pytest.raises(ValueError, match=r"one.*two.*in1k_knn top1/k=10 of trained"):
        blocks_of(*folders)


def test_results_of_several_weights_are_told(make: Make) -> None:
    one = make("one", "in1k_linear", rows({"top1/avgpool": 40.0}))
    two = make("two", "in1k_mhead", rows({"top1/res4": 50.0}, checkpoint_sha256="cd" * 32))
    warnings = [b.text for b in blocks_of(one, two) if isinstance(b, Text) and b.warning]
    assert "trained results of several weights files: abababababab, cdcdcdcdcdcd." in warnings


class Checker(HTMLParser):
    """Tags that open and close in order, text, and images."""

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


def test_html_is_one_whole_file_whatever_runs_are_called(make: Make) -> None:
    evil = '<script>alert("x")</script>&amp;'
    recipe = "<img src=x onerror=alert(1)>"
    fields = {"backbone": "</table><b>"}
    trained = make("<b>&'\"", recipe, rows({f"top1|{evil}": 1.0}), weights=evil, fields=fields)
    text = html(blocks_of(trained), title="A & <B>")
    checker = Checker()
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


def test_markdown_shows_what_is_in_the_runs(make: Make) -> None:
    nasty = "a|b *c* <d> `e`\n# f"
    text = markdown([Heading(nasty, 2), Code("```\nls")], folder=Path())
    assert text == "## a\\|b \\*c\\* \\<d\\> \\`e\\` \\# f\n\n````\n```\nls\n````\n"
    trained = make("run", "own|recipe", rows({"top1|x": 3.0}))
    assert table(rendered(trained), "own\\|recipe")["top1\\|x"]["trained"] == "3.00"


def damage(kind: str, folder: Path) -> None:
    match kind:
        case "unfinished":
            (folder / "done.json").unlink()
        case "no run folder":
            (folder / "results.json").unlink()
        case "not JSON":
            (folder / "results.json").write_text('[{"metric": "to')
        case "recipe.json is not JSON":
            (folder / "recipe.json").write_text("{")
        case "no whole PNG":
            figure = folder / "figures" / "curves.png"
            figure.write_bytes(figure.read_bytes()[:-200])
        case "whose weights":
            found = json.loads((folder / "results.json").read_text())
            del found[0]["weights"]
            write_json(folder / "results.json", found)
        case "is no result":
            found = json.loads((folder / "results.json").read_text())
            found[0]["value"] = "high"
            write_json(folder / "results.json", found)
        case "is empty":
            write_json(folder / "results.json", [])


BROKEN = (
    "unfinished", "no run folder", "not JSON", "recipe.json is not JSON", "no whole PNG",
    "whose weights", "is no result", "is empty",
)  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_run_is_named_and_no_page_is_written(
    make: Make, script: ModuleType, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = make("good", "in1k_knn", rows({"top1/k=10": 11.5}))
    bad = make("bad", "in1k_knn", rows({"top1/k=20": 12.5}))
    damage(kind, bad)
    output = good.parent / "page.md"
    output.write_text("the last one")
    arguments = script.Arguments(runs=(bad, good), output=output)
    with pytest.raises(ValueError, match=kind) as caught:
        script.main(arguments)
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)
    assert output.read_text() == "the last one"
    assert sorted(p.name for p in output.parent.iterdir()) == ["bad", "good", "page.md"]
    script.main(replace(arguments, skip_broken=True))
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("report: left out:") and str(bad) in line
    text = output.read_text()
    cells = table(text, "ImageNet-1k, weighted")
    assert (cells["k = 10"]["trained"], cells["k = 20"]["trained"]) == ("11.50", NOT_RUN)
    assert "Left out as broken: bad." in text


@pytest.mark.parametrize("suffix", ["md", "html"])
def test_notes_stand_at_the_head(make: Make, script: ModuleType, suffix: str) -> None:
    run = make("run", "in1k_knn", rows({"top1/k=10": 11.0}))
    notes, output = run.parent / "notes.txt", run.parent / f"page.{suffix}"
    notes.write_text("One line <u>\nand another.\n\n\nA second | paragraph.\n")
    script.main(script.Arguments(runs=(run,), output=output, notes=notes))
    text = output.read_text()
    first = "One line &lt;u&gt; and another." if suffix == "html" else "and another."
    assert text.index(first) < text.index("paragraph.") < text.index("Rotation prediction (acc")
    assert "<u>" not in text


def test_the_script_says_what_is_wrong_in_one_line(
    make: Make, script: ModuleType, tmp_path: Path
) -> None:
    run = make("run", "in1k_knn", rows({"top1/k=10": 11.0}))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(run), "--output", "page.pdf"],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "must end in .md or .html" in done.stderr
    for name, data, words in (
        ("page.html", None, "--gallery and --data go together"),
        ("page.md", "images", r"--gallery needs an \.html page"),
    ):
        arguments = script.Arguments(
            runs=(run,), output=tmp_path / name, gallery="random", data=data
        )
        with pytest.raises(ValueError, match=words):
            script.main(arguments)
    assert not list(tmp_path.glob("page.*"))


def test_kept_copies_of_runs_are_read_and_pages_are_equal(
    make: Make, script: ModuleType, tmp_path: Path
) -> None:
    run = make("linear", "cifar10_linear", rows({"top1/res2": 64.0}), world=3)
    kept = tmp_path / "kept"
    kept.mkdir()
    for part in ("results", "env"):
        shutil.copy(run / f"{part}.json", kept / f"trained.{part}.json")
    shutil.copy(run / "figures" / "curves.png", kept)
    pages = []
    for name in ("one.html", "two.html"):
        script.main(script.Arguments(runs=(kept,), output=tmp_path / name))
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]
    text = rendered(kept)
    assert table(text, "CIFAR-10, linear")["top1/res2"]["trained"] == "64.00"
    assert "# trained: kept/trained\ntorchrun --standalone --nproc-per-node 3 scripts/" in text
    (kept / "trained.env.json").unlink()
    command = "--nproc-per-node 1 scripts/evaluate.py cifar10_linear --weights backbone.safetensors"
    assert command in rendered(kept)


def test_attention_is_the_normalised_sum_of_powers() -> None:
    maps = torch.randn(3, 7, 4, 5, generator=torch.Generator().manual_seed(0)) * 1e12
    maps[2] = 4.0
    for power in feature_plots.POWERS:
        found = feature_plots.attention(maps, power=power).numpy()
        total = (np.abs(maps.double().numpy()) ** power).sum(1)
        low, high = total.min((1, 2), keepdims=True), total.max((1, 2), keepdims=True)
        expected = (total - low)[:2] / (high - low)[:2]
        np.testing.assert_allclose(found[:2], expected, atol=1e-4)
        assert (found[2] == 0).all()  # the same everywhere: nothing stands out
    assert feature_plots.attention(torch.zeros(1, 2, 3, 3), power=4).eq(0).all()


def test_nearest_are_the_highest_cosines_but_not_itself() -> None:
    features = np.random.default_rng(0).normal(size=(30, 6))
    features[7] = 3 * features[4] + 0.01
    found, similar = feature_plots.nearest(features, [4, 11], k=5)
    for line, query in enumerate((4, 11)):
        cosine = {
            i: float(row @ features[query] / np.linalg.norm(row) / np.linalg.norm(features[query]))
            for i, row in enumerate(features)
            if i != query
        }
        expected = sorted(cosine, key=lambda i: -cosine[i])[:5]
        assert found[line].tolist() == expected
        np.testing.assert_allclose(similar[line], [cosine[i] for i in expected])
    assert found[0, 0] == 7
    with pytest.raises(ValueError, match="30 neighbours of 29"):
        feature_plots.nearest(features, [0], k=30)


def test_examples_take_classes_in_turn() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert feature_plots.examples(labels, 3) == [0, 3, 5]
    assert feature_plots.examples(labels, 5) == [0, 1, 3, 4, 5]
    assert feature_plots.examples(labels, 2) == [0, 5]
    assert feature_plots.examples(np.arange(100), 3) == [0, 50, 99]
    assert feature_plots.examples(np.full(4, -1), 9) == [0, 1, 2, 3]


def test_projection_separates_what_is_separate() -> None:
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 12)
    features = draw.normal(size=(36, 10)) + 30 * np.eye(10)[labels]
    once, again = feature_plots.project(features), feature_plots.project(features)
    for points, same in zip(once, again, strict=True):
        assert points.shape == (36, 2) and (points == same).all()
        for i in range(36):
            gaps = np.linalg.norm(points - points[i], axis=1)
            gaps[i] = np.inf
            assert labels[gaps.argmin()] == labels[i]
    variance = np.linalg.eigvalsh(np.cov(features.T))[::-1][:2]
    np.testing.assert_allclose(once[0].var(axis=0, ddof=1), variance)
    with pytest.raises(ValueError, match="4 samples"):
        feature_plots.project(features[:4])


def test_retrieval_and_projection_name_the_classes() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    labels = np.array([0, 0, 1, 1, 2, -1])
    features = np.eye(6) + 0.1
    features[1] = features[0] + 0.01
    fig = feature_plots.retrieval(
        images, features, labels, queries=[0], classes=("cat", "dog"), k=9
    )
    titles = [ax.get_title() for ax in fig.axes]
    assert titles[0] == "cat" and titles[1] == "cat\n1.00" and len(titles) == 6
    assert {title.partition("\n")[0] for title in titles[2:]} == {"dog", "2", "no label"}
    np.testing.assert_array_equal(fig.axes[1].get_images()[0].get_array(), images[1])
    legend = feature_plots.projection(features, labels, classes=("cat", "dog")).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["no label", "cat", "dog", "2"]


def test_showcase_of_a_small_network(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    weights = tmp_path / "backbone.safetensors"
    save_backbone(weights, build_backbone("resnet18_tiny"), {})
    blocks = showcase(str(weights), str(folder), stage="res3", samples=20)
    assert isinstance(blocks[1], Text) and "resnet18_tiny" in blocks[1].text
    text = html(blocks, title="")
    checker = Checker()
    checker.feed(text)
    assert len(checker.images) == 3
    for source in checker.images:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            assert image.format == "PNG" and len(set(image.convert("L").tobytes())) > 20
    with pytest.raises(ValueError, match=r"needs an \.html page"):
        markdown(blocks, folder=tmp_path)
    with pytest.raises(ValueError, match="give --backbone"):
        showcase("random", str(folder))
    with pytest.raises(ValueError, match="no stage conv9"):
        showcase(str(weights), str(folder), stage="conv9")
    with pytest.raises(ValueError, match="has 4 images"):
        showcase(str(weights), str(folder), samples=4)
