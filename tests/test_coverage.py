"""The table of stock models says what becomes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from focus_compile import coverage
from focus_compile.coverage import FAMILIES, Coverage

CAUSAL = replace(FAMILIES["llama"], options={**FAMILIES["llama"].options, "is_causal": True})


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bidirectional family, and a decoder that keeps its causal mask unless given another."""
    monkeypatch.setattr(coverage, "FAMILIES", {"bert": FAMILIES["bert"], "causal": CAUSAL})
    monkeypatch.setattr(coverage, "IMPLEMENTATIONS", ("sdpa",))


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
    }
    [refused] = [one for one in found if one.reason]
    assert "causal attention" in refused.reason
    assert "| bert | bidirectional | plan |" in done.output
    assert "| causal | bidirectional | refused (1) |" in done.output
    assert f"1. {refused.reason}" in done.output
