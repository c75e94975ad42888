"""The table of stock models says what becomes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from focus_compile import coverage
from focus_compile.coverage import FAMILIES, IMPLEMENTATIONS, WAYS, Coverage, Way

CAUSAL = replace(FAMILIES["llama"], options={**FAMILIES["llama"].options, "is_causal": True})


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bidirectional family, and a decoder that keeps its causal mask unless given another."""
    monkeypatch.setattr(coverage, "FAMILIES", {"bert": FAMILIES["bert"], "causal": CAUSAL})
    monkeypatch.setattr(coverage, "IMPLEMENTATIONS", ("sdpa",))
    monkeypatch.setattr(coverage, "WAYS", {"labels": Way("bert", WAYS["labels"].inputs)})


@pytest.mark.long
@pytest.mark.usefixtures("few")
def test_what_is_planned_and_why_the_rest_is_not(tmp_path: Path) -> None:
    file = tmp_path / "coverage.json"
    done = CliRunner().invoke(coverage.app, ["--markdown", "--json", str(file)])
    assert done.exit_code == 0, done.output
    found = [Coverage(**row) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    outcomes = {(one.family, one.attention): one.outcome for one in found}
    assert outcomes == {
        ("bert", "bidirectional"): "plan",
        ("causal", "bidirectional"): "refused",
        ("causal", "block-causal"): "plan",
        ("bert", "labels"): "plan",
    }
    (refused,) = (one for one in found if one.reason)
    assert "causal attention" in refused.reason
    assert "| bert | bidirectional | plan |" in done.output
    assert "| causal | bidirectional | refused (1) |" in done.output
    assert f"1. {refused.reason}" in done.output


def test_the_documented_table_is_of_today() -> None:
    """Every family, way and implementation that is tried has its row or column."""
    text = (Path(__file__).parents[1] / "docs" / "coverage.md").read_text(encoding="utf-8")
    assert f"| cpu | | {' | '.join(IMPLEMENTATIONS)} |" in text
    rows = [(name, "bidirectional") for name in FAMILIES]
    rows += [(name, "block-causal") for name, family in FAMILIES.items() if family.decoder]
    rows += [(way.family, name) for name, way in WAYS.items()]
    missing = [f"| {name} | {how} |" for name, how in rows if f"| {name} | {how} |" not in text]
    assert not missing
