"""`list_reuse`: steps that read the keys which an earlier one chose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import focus_compile
from focus_compile.runtime.inspection import CallInspection, inspecting
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.store import STORE
from tests.compiled import compiled, run_call, seen_steps
from tests.oracle import Oracle
from tests.runtime.tiny import OPTIONS, decided, prompt, shared, tiny_model

LONG = OPTIONS | {"dense_layers": 0, "keep_ratio": 0.3, "block_length": 8, "key_block": 1}


@pytest.fixture
def programs_run(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every step, whether it read keys chosen earlier."""
    run, found = Programs.run_step, list[bool]()

    def noting(self: Programs, *args: Any, again: bool = False) -> Any:
        again = again or (len(args) > 5 and args[5])
        found.append(again)
        return run(self, *args[:5], again=again)

    monkeypatch.setattr(Programs, "run_step", noting)
    return found


@pytest.mark.parametrize(
    ("reuse", "refresh", "again"),
    [(2, "block", "0101010010"), (3, 3, "01010101"), (100, "block", "0111111011")],
)
def test_steps_follow_the_oracle(
    reuse: int, refresh: str | int, again: str, programs_run: list[bool]
) -> None:
    """again: of every step, whether it goes on reading; there is a refresh after the seventh."""
    model, ids = tiny_model(), prompt(masks=12, length=28)
    options = LONG | {"list_reuse": reuse, "refresh": refresh}
    focus, oracle = compiled(model, **options), Oracle(model, **options)
    run_call(focus, ids)
    assert oracle.call(ids).program == "refresh"
    programs_run.clear()
    for _ in range(11):
        ids = decided(ids)
        expected = oracle.call(ids)
        logits, record = run_call(focus, ids)
        assert record.program == expected.program
        assert record.chosen is (not programs_run[-1] if record.program == "step" else None)
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert "".join(str(int(each)) for each in programs_run) == again


def test_the_keys_are_those_of_the_step_before() -> None:
    model, ids = tiny_model(), prompt(masks=12, length=28, batch=2)
    focus = compiled(model, **LONG, list_reuse=2)
    run_call(focus, ids)
    keys = []
    for _ in range(6):
        ids = decided(ids)
        with seen_steps() as seen:
            run_call(focus, ids)
        keys.append(seen[-1].keys)
    assert keys[0] == keys[1]
    assert keys[2] == keys[3]
    assert len({str(each) for each in keys}) > 1, "nothing was ever chosen anew"


def test_keys_of_the_guard_are_read_at_once(programs_run: list[bool]) -> None:
    """The guard's first level leaves no key out: lists of before would."""
    model, ids = tiny_model(), prompt(masks=12, length=28)
    focus = compiled(model, **LONG, list_reuse=50)
    run_call(focus, ids)
    for _ in range(2):
        ids = decided(ids)
        run_call(focus, ids)
    STORE.slot(next(model.parameters())).trajectory.read_all_keys()
    with seen_steps() as seen:
        run_call(focus, decided(ids))
    assert seen[-1].keys == [[list(range(28))]] * 2


def test_what_is_noted_of_a_step_says_what_it_read() -> None:
    model, ids = tiny_model(), prompt(masks=12, length=28)
    focus = compiled(model, **LONG, list_reuse=3)
    noted: list[CallInspection] = []
    with inspecting(lambda _, call: noted.append(call)):
        for _ in range(3):
            run_call(focus, ids)
            ids = decided(ids)
    first, second = noted[1:]
    assert first.blocks
    for site, blocks in first.blocks.items():
        assert torch.equal(second.blocks[site], blocks)
    assert first.sinks is not None
    assert second.sinks is not None
    assert torch.equal(first.sinks, second.sinks)


@pytest.mark.long
def test_both_steps_are_compiled_in_a_warm_up() -> None:
    model, ids = tiny_model(), prompt(masks=12, length=28)
    focus = compiled(model, **LONG, list_reuse=2, lowering="inductor")
    focus_compile.warmup(focus, ids)
    oracle = Oracle(model, **LONG, list_reuse=2)
    with focus_compile.record() as history:
        for _ in range(4):
            expected = oracle.call(ids).logits
            with torch.no_grad():
                torch.testing.assert_close(focus(ids), expected, rtol=1e-4, atol=1e-4)
            ids = decided(ids)
    assert [record.program for record in history] == ["refresh", "step", "step", "step"]
    assert [record.compile_seconds for record in history] == [0] * 4


def test_policies_without_sparse_layers_hold_no_lists() -> None:
    focus, ids = shared(tiny_model(), policy="dual-cache", list_reuse=4), prompt(masks=6)
    run_call(focus, ids)
    assert run_call(focus, decided(ids))[1].program == "step"
