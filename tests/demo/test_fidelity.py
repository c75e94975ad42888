"""The fidelity table: its arms, its counting, and one small run of all of it."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from focus_compile.demo import fidelity
from focus_compile.demo.fidelity import FidelitySettings
from focus_compile.errors import OptionError
from focus_compile.runtime.record import StepRecord

ARMS = [
    "dense",
    "dual-cache",
    "focus α=0.5",
    "focus α=0.5, no sinks",
    "focus α=0.25",
    "focus α=0.25, no sinks",
    "focus α=0.1",
    "focus α=0.1, no sinks",
    "mean keys α=0.1",
    "mean keys α=0.1, no sinks",
]


def test_the_arms() -> None:
    arms = fidelity.arms(FidelitySettings(block_length=16))
    assert [arm.name for arm in arms] == ARMS
    assert arms[0].options is None
    assert all(arm.options and arm.options["block_length"] == 16 for arm in arms[1:])
    assert arms[5].options == {
        "policy": "focus-dllm",
        "keep_ratio": 0.25,
        "sink_tokens": 0,
        "block_length": 16,
        "lowering": "inductor",
    }


def test_kept_counts_only_what_dense_gets_right() -> None:
    settings = FidelitySettings(examples=2, length=100, gen_length=20, block_length=10)
    refreshes = [StepRecord("refresh", "", 100, prompt_rows=80), StepRecord("step", "", 9)]
    partial = StepRecord("partial", "", 30, prompt_rows=16, error=0.25)
    marks = [True, True, False]
    score = fidelity._score(marks, [True, False, True], [*refreshes * 2, partial], 1.0, settings)
    assert (score.refreshed, score.error) == (176 / (2 * 2 * 80), 0.25)
    assert (score.right, score.asked, score.kept) == (2, 3, 0.5)
    assert score.accuracy == pytest.approx(2 / 3)
    assert fidelity._score([True], [False], [], 1.0, settings).kept is None
    assert fidelity._score([True], None, [], 1.0, settings).kept is None


def test_the_arms_of_refreshing() -> None:
    settings = FidelitySettings(refresh="adaptive", dense=False, only=("adaptive",))
    (arm,) = fidelity.arms(settings)
    assert arm.options == {"refresh": "adaptive", "block_length": 32, "lowering": "inductor"}
    names = [arm.name for arm in fidelity.arms(FidelitySettings(refresh="adaptive"))]
    assert names[:4] == ["dense", "block refresh", "refreshed once", "adaptive"]
    with pytest.raises(OptionError, match="unknown arm 'adaptiv'; did you mean 'adaptive'"):
        fidelity.arms(FidelitySettings(refresh="adaptive", only=("adaptiv",)))
    with pytest.raises(OptionError, match="unknown refresh 'never'"):
        fidelity.arms(FidelitySettings(refresh="never"))


def test_bad_settings() -> None:
    with pytest.raises(OptionError, match="not a multiple"):
        next(fidelity.run(FidelitySettings(gen_length=40)))


@pytest.mark.long
@pytest.mark.usefixtures("quick_arms")
def test_a_small_run() -> None:
    names = [*ARMS[:2], ARMS[-1]]
    settings = FidelitySettings(
        length=192,
        examples=3,
        batch=2,
        gen_length=32,
        block_length=16,
        questions=2,
        lowering="eager",
        only=tuple(names[1:]),
    )
    answered: list[tuple[str, int]] = []
    results = list(fidelity.run(settings, lambda *step: answered.append(step)))
    assert answered == [(name, count) for name in names for count in (2, 1, 2, 1)]
    assert [list(result.scores) for result in results] == [
        names[: count + 1] for count in range(len(names))
    ]
    result = results[-1]
    for name, kinds in result.scores.items():
        assert set(kinds) == {"needle", "table"}
        for score in kinds.values():
            assert score.asked == 6
            assert (score.recall is None) == (name == "dense")
    assert result.scores["dense"]["needle"].right == 6
    assert result.scores["dual-cache"]["needle"].right == 6

    written = json.loads(json.dumps(result.to_dict()))
    assert [arm["name"] for arm in written["arms"]] == names
    assert written["settings"]["examples"] == 3
    console = Console(file=io.StringIO(), width=100)
    console.print(fidelity.table(result))
    assert isinstance(console.file, io.StringIO)
    assert all(name in console.file.getvalue() for name in names)
