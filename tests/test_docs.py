"""Documentation: README examples run, named files exist, the diagram matches the imports."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pipelines
import rotpred

ROOT = Path(__file__).parents[1]
DRAW: dict[str, Any] = runpy.run_path(str(ROOT / "scripts/draw_imports.py"))
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("number", range(2))
def test_examples_of_the_readme_run(
    number: int, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, on small images, and each takes a step."""
    for name in (beton.name, f"{beton.name}.json", f"{beton.name}.segments"):
        shutil.copy(beton.with_name(name), tmp_path / name.replace("data", "train"))
    monkeypatch.chdir(tmp_path)
    assert len(EXAMPLES) == 2 and len(EXAMPLES[number].splitlines()) <= 12
    code = EXAMPLES[number].replace("RandomResizedCrop(224)", "RandomResizedCrop(32)")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    views = (1, 4)[number]
    assert names["batch"].images.shape == (32 * views, 3, 32, 32)
    assert names["loss"].isfinite()


def test_the_diagram_matches_the_imports() -> None:
    """`make docs` would change nothing."""
    page = (ROOT / "docs/architecture.md").read_text()
    assert DRAW["page"](page) == page
    assert DRAW["drawing"]() == (ROOT / "docs/imports.svg").read_text()


def test_a_new_import_changes_the_diagram() -> None:
    """Arrows that a longer path implies are left out, and no others."""
    edges = {"a": frozenset("bc"), "b": frozenset("c"), "c": frozenset[str]()}
    assert DRAW["needed"](edges) == {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset()}
    assert "splice" not in DRAW["imports"]("pipelines") and "jpeg" in DRAW["imports"]("pipelines")


@pytest.mark.parametrize(
    "page", ["docs/architecture.md", "CONTRIBUTING.md", "README.md", "CHANGELOG.md"]
)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:pipelines|rotpred|tests|benchmarks|scripts|docs)/[\w./]*)`", text)
    linked = [
        str((ROOT / page).parent.joinpath(link).resolve().relative_to(ROOT))
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    ]
    assert linked and [n for n in (*named, *linked) if not (ROOT / n).exists()] == []


def test_the_demo_explains_itself() -> None:
    """Asking for help must not start the job."""
    command = [sys.executable, str(ROOT / "scripts/demo.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: demo.py") and "== Convert" not in done.stdout


def test_public_faces_are_light_and_whole() -> None:
    """Importing the packages loads no torch and no numpy; every public name can be had."""
    code = (
        "import sys, pipelines, rotpred\n"
        "assert not {'torch', 'numpy', 'ffcv', 'nvidia'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    for package in (pipelines, rotpred):
        assert [name for name in package.__all__ if not hasattr(package, name)] == []
        assert dir(package) == sorted(package.__all__)
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = package.nothing
