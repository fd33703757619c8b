"""Tests that need an engine's package are skipped where it is missing, and only there."""

from __future__ import annotations

import pytest

from pipelines.engines.choice import ENGINES
from tests.support import engines


@pytest.mark.parametrize(
    ("package", "expected"), [("json", None), ("json.no_such_module", "it is broken")]
)
def test_only_a_missing_package_skips(
    monkeypatch: pytest.MonkeyPatch, package: str, expected: str | None
) -> None:
    """An engine whose own module is broken is not called missing: its tests fail."""
    monkeypatch.setattr(engines, "missing_reason", lambda _engine: "it is broken")
    monkeypatch.setitem(ENGINES, "dali", ("pipelines.engines.dali.source", package))
    assert engines.missing.__wrapped__("dali") == expected


def test_parameters_carry_the_marker_of_their_engine() -> None:
    made = engines.engines("dali-folder", "folder-beton")
    assert [[mark.name for mark in one.marks] for one in made] == [["dali"], []]
