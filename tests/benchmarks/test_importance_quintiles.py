"""What the study of importance counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.importance_quintiles import Tally, plot


def test_the_top_fifth_is_of_the_masked_tokens() -> None:
    tally = Tally(layers=3)
    masked = torch.ones(1, 10, dtype=torch.bool)
    masked[0, 9] = False
    rising = torch.arange(10.0)[None]
    decoded = torch.zeros_like(masked)
    decoded[0, [0, 8]] = True
    tally.add([torch.zeros(1, 10), rising, torch.zeros(1, 10)], masked, decoded)
    assert tally.decoded == 2
    assert tally.chance == pytest.approx(2 * 2 / 9)
    assert tally.top == [1, 1]  # 8 is highest in layer 1, 0 falls least from there to layer 2
    few = torch.zeros_like(masked)
    few[0, :4] = True
    tally.add([rising, rising, rising], few, few)
    assert tally.decoded == 2
    assert tally.to_dict()["top_fifth"] == [0.5, 0.5]


def test_the_plot(tmp_path: Path) -> None:
    rule = {"decoded": 2, "chance": 0.2, "top_fifth": [0.5, 0.25]}
    file = tmp_path / "plot.svg"
    plot({"rules": {"1 a step": rule}}, file)
    assert "<svg" in file.read_text(encoding="utf-8")
