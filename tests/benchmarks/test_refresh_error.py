"""The estimate of a partial refresh against the error that it leaves, on the bundled model."""

from __future__ import annotations

import pytest
import torch

from benchmarks import refresh_error
from benchmarks.refresh_error import Entry, measure, summary
from focus_compile import demo


@pytest.mark.slow
def test_the_estimate_is_honest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large where the error is, and seldom far below it."""
    monkeypatch.setattr(refresh_error, "GEN_LENGTH", 32)
    torch.manual_seed(0)
    model, tokenizer = demo.load()
    entries = measure(model, tokenizer, 288, "needle", 2, 0.15)
    found = summary(entries)
    assert found["entries"] == len(entries) == 6
    assert 0.8 < found["median estimated / true"] < 5
    assert found["below half of it"] <= 0.34
    assert found["correlation of logarithms"] > 0.3


def test_the_summary_counts() -> None:
    pairs = ((0.04, 0.1), (0.08, 0.1), (0.1, 0.1), (0.4, 0.2))
    entries = [Entry(9, "needle", 0.1, *pair) for pair in pairs]
    found = summary(entries)
    assert found["below the true error"] == 0.5
    assert found["below half of it"] == 0.25
    assert found["median estimated / true"] == pytest.approx(0.9)
