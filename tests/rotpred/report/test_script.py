"""scripts/report.py: broken runs, notes, errors, kept copies of runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from pipelines.storage import write_json
from rotpred.report.page import NOT_RUN
from tests.support.report_pages import rendered, rows, table

pytestmark = pytest.mark.timeout(120)


Make = Callable[..., Path]


def damage(kind: str, folder: Path) -> None:
    match kind:
        case "unfinished":
            (folder / "done.json").unlink()
        case "not a run folder":
            (folder / "results.json").unlink()
        case "not JSON":
            (folder / "results.json").write_text('[{"metric": "to')
        case "recipe.json is not JSON":
            (folder / "recipe.json").write_text("{")
        case "not a complete PNG":
            figure = folder / "figures" / "curves.png"
            figure.write_bytes(figure.read_bytes()[:-200])
        case "does not name its weights":
            found = json.loads((folder / "results.json").read_text())
            del found[0]["weights"]
            write_json(folder / "results.json", found)
        case "is not a result":
            found = json.loads((folder / "results.json").read_text())
            found[0]["value"] = "high"
            write_json(folder / "results.json", found)
        case "is empty":
            write_json(folder / "results.json", [])


BROKEN = (
    "unfinished", "not a run folder", "not JSON", "recipe.json is not JSON", "not a complete PNG",
    "does not name its weights", "is not a result", "is empty",
)  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_run_is_named_and_no_page_is_written(
    make_run: Make, script: ModuleType, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = make_run("good", "in1k_knn", rows({"top1/k=10": 11.5}))
    bad = make_run("bad", "in1k_knn", rows({"top1/k=20": 12.5}))
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
def test_notes_stand_at_the_head(make_run: Make, script: ModuleType, suffix: str) -> None:
    run = make_run("run", "in1k_knn", rows({"top1/k=10": 11.0}))
    notes, output = run.parent / "notes.txt", run.parent / f"page.{suffix}"
    notes.write_text("One line <u>\nand another.\n\n\nA second | paragraph.\n")
    script.main(script.Arguments(runs=(run,), output=output, notes=notes))
    text = output.read_text()
    first = "One line &lt;u&gt; and another." if suffix == "html" else "and another."
    assert text.index(first) < text.index("paragraph.") < text.index("Rotation prediction (acc")
    assert "<u>" not in text


def test_the_script_says_what_is_wrong_in_one_line(
    make_run: Make, script: ModuleType, tmp_path: Path
) -> None:
    run = make_run("run", "in1k_knn", rows({"top1/k=10": 11.0}))
    done = subprocess.run(
        [sys.executable, script.__file__, str(run), "--output", "page.pdf"],
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
    make_run: Make, script: ModuleType, tmp_path: Path
) -> None:
    run = make_run("linear", "cifar10_linear", rows({"top1/res2": 64.0}), world=3)
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
