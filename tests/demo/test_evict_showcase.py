"""The demo of token eviction: what it measures, and the shape of its results file."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from focus_compile.demo import evict_showcase
from focus_compile.demo.evict_showcase import (
    EvictArmResult,
    EvictShowcaseResult,
    EvictShowcaseSettings,
)
from focus_compile.errors import OptionError

ARMS = ["block-diffusion", "delayed-cache", "focus-evict"]


def result() -> EvictShowcaseResult:
    rows = {"block-diffusion": 16.5, "delayed-cache": 12.25, "focus-evict": 4.0}
    arms = {
        name: EvictArmResult(95, 96, 33, kept, kept, kept, 1.0, 20.0, 10.0)
        for name, kept in rows.items()
    }
    return EvictShowcaseResult(arms=arms, same_answers=True, settings={"length": 1024})


@pytest.mark.slow
def test_all_arms_are_measured() -> None:
    console = Console(file=io.StringIO(), width=100)
    settings = EvictShowcaseSettings(
        length=128, gen_length=32, batch=2, questions=2, tokens_per_step=4, lowering="eager"
    )
    found = evict_showcase.run(settings, console)
    assert list(found.arms) == ARMS
    plain, delayed, evicting = found.arms.values()
    assert all(arm.asked == 4 and arm.seconds > 0 for arm in found.arms.values())
    assert plain.steps == 8
    assert plain.kept_rows_per_token == pytest.approx(32 / 4)
    assert delayed.kept_rows_per_token < plain.kept_rows_per_token
    assert evicting.kept_rows_per_token < evicting.listed_rows_per_token
    assert found.settings["threads"] >= 1
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "2 questions of 128 tokens (needle), 2 values each, decoding 4 tokens a step" in shown
    assert "focus-evict: 32/32 tokens" in shown


def test_the_results_file() -> None:
    written = json.loads(json.dumps(result().to_dict()))
    assert list(written["arms"]) == ARMS
    assert written["arms"]["focus-evict"]["kept_rows_per_token"] == 4
    assert written["same_answers"]


def test_the_table_for_people() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(evict_showcase.table(result()))
    assert isinstance(console.file, io.StringIO)
    for cell in ("95/96", "12.25", "16.50", "focus-evict"):
        assert cell in console.file.getvalue()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_step": 0}, "tokens_per_step=0"),
        ({"tokens_per_step": None, "threshold": -1.0}, "threshold=-1.0"),
        ({"gen_length": 40}, "gen_length=40"),
        ({"length": 128}, "128 tokens cannot hold 12 facts"),
    ],
)
def test_bad_settings_fail_before_any_work(settings: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        evict_showcase.run(
            EvictShowcaseSettings(**settings),  # type: ignore[arg-type]
            Console(file=io.StringIO()),
        )
