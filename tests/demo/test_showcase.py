"""The demo's measurement: what it counts, and the shape of its results file."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from focus_compile.demo import showcase
from focus_compile.demo.showcase import ArmResult, ShowcaseResult, ShowcaseSettings
from focus_compile.errors import OptionError


def result(dense_seconds: float, focus_seconds: float) -> ShowcaseResult:
    return ShowcaseResult(
        dense=ArmResult(4, 4, dense_seconds, 20.0, 64, 131_072),
        focus=ArmResult(3, 4, focus_seconds, 30.0, 64, 4_096),
        same_answers=False,
        settings={"length": 2048},
    )


@pytest.mark.long
@pytest.mark.usefixtures("quick_arms")
def test_both_arms_are_measured() -> None:
    console = Console(file=io.StringIO(), width=100)
    settings = ShowcaseSettings(length=192, gen_length=32, block_length=16, questions=2)
    found = showcase.run(settings, console, recorded=True)
    assert found.same_answers
    for arm in (found.dense, found.focus):
        assert (arm.right, arm.asked, arm.model_calls) == (2, 2, 32)
        assert arm.seconds > 0
        assert arm.compile_seconds > 0
    assert found.dense.rows == 32 * 192
    assert 2 * 192 <= found.focus.rows < found.dense.rows / 4
    assert found.settings["length"] == 192
    assert found.settings["threads"] >= 1
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "dense: 32/32 tokens" in shown
    assert "call 32 (step)" in shown
    record = found.record
    assert record is not None
    assert len(record.calls) == 32
    assert record.arms["dense"]["tokens"] == record.arms["focus"]["tokens"]
    assert record.arms["focus"]["seconds"] == found.focus.seconds
    assert record.calls[0]["top"]
    assert "record" not in found.to_dict()


def test_the_results_file() -> None:
    written = json.loads(json.dumps(result(10.0, 0.8).to_dict()))
    arm = {"right", "asked", "seconds", "compile_seconds", "model_calls", "rows"}
    assert set(written) == {"speedup", "dense", "focus", "settings"}
    assert set(written["dense"]) == set(written["focus"]) == arm
    assert written["speedup"] == pytest.approx(12.5)


def test_the_table_for_people() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(showcase.table(result(10.0, 0.8)))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for cell in ("4/4", "3/4", "131,072", "32.0x", "12.5x"):
        assert cell in shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "dual-cash"}, "did you mean 'dual-cache'"),
        ({"keep_ratio": 1.5}, "keep_ratio=1.5"),
        ({"gen_length": 40}, "not a multiple"),
        ({"length": 70}, "70 tokens cannot hold"),
    ],
)
def test_bad_settings_fail_before_any_work(settings: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        showcase.run(ShowcaseSettings(**settings), Console(file=io.StringIO()))  # type: ignore[arg-type]
