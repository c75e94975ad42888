"""Whatever fails inside a call, the next one starts from a refresh: nothing torn survives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import focus_compile
from focus_compile.lowering.program import Program
from focus_compile.runtime import dispatch
from focus_compile.runtime.latest_rows import LatestRows
from focus_compile.runtime.programs import Programs
from focus_compile.runtime.store import STORE
from tests.compiled import run_call
from tests.runtime.tiny import assert_own, decided, prompt, shared, tiny_model


class FailsOnce:
    """Stands in for a method: runs it, then raises at the n-th call."""

    def __init__(self, method: Any, error: BaseException, at: int = 1) -> None:
        self.method, self.error, self.left = method, error, at

    def __get__(self, instance: Any, owner: Any) -> Any:
        return lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.method(*args, **kwargs)
        self.left -= 1
        if self.left == 0:
            raise self.error
        return result


@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("owner", "method"), [(Programs, "run_step"), (Program, "__call__"), (LatestRows, "write")]
)
def test_a_step_that_fails(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, owner: Any, method: str
) -> None:
    model = tiny_model()
    focus, ids = shared(model), prompt()
    run_call(focus, ids)
    ids = decided(ids)
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, FailsOnce(getattr(owner, method), error))
        with pytest.raises(type(error)):
            run_call(focus, ids)
        assert STORE.nbytes == 0
    logits, record = run_call(focus, ids)
    assert (record.program, record.why) == ("refresh", "new trajectory: first call")
    assert_own(logits, model, ids)
    assert run_call(focus, decided(ids))[1].program == "step"


@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt()])
@pytest.mark.parametrize("first", [True, False])
def test_a_refresh_that_fails(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, first: bool
) -> None:
    model = tiny_model()
    focus, ids = shared(model), prompt(masks=6)
    if not first:
        run_call(focus, ids)
        ids = decided(ids, 4)
    with monkeypatch.context() as patch:
        patch.setattr(Program, "__call__", FailsOnce(Program.__call__, error))
        with pytest.raises(type(error)):
            run_call(focus, ids)
        assert STORE.nbytes == 0
    logits, record = run_call(focus, ids)
    assert (record.program, record.why) == ("refresh", "new trajectory: first call")
    assert_own(logits, model, ids)


def test_an_interrupted_first_run_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    focus = shared(tiny_model())
    with monkeypatch.context() as patch:
        interrupted = FailsOnce(dispatch.check_plan, KeyboardInterrupt())
        patch.setattr(dispatch, "check_plan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_call(focus, prompt())
    counted = FailsOnce(dispatch.check_plan, RuntimeError("unused"), at=100)
    monkeypatch.setattr(dispatch, "check_plan", counted)
    run_call(focus, prompt())
    assert counted.left == 99


def test_out_of_memory_keeps_torchs_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for K/V: the old state is given back first, and the error says what was asked."""
    model = tiny_model()
    focus, ids = shared(model), prompt()
    run_call(focus, ids)

    def allocate(programs: Programs, args: Any) -> Any:
        assert STORE.nbytes == 0
        return torch.empty(2**60, dtype=torch.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(Programs, "allocate", allocate)
        with pytest.raises(RuntimeError, match=r"allocate memory|out of memory"):
            run_call(focus, prompt(seed=1, length=16))
    assert STORE.nbytes == 0
    logits, record = run_call(focus, ids)
    assert record.program == "refresh"
    assert_own(logits, model, ids)


def test_an_error_of_the_exact_program_leaves_the_trajectory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    focus, ids = shared(tiny_model()), prompt()
    run_call(focus, ids)
    with monkeypatch.context() as patch:
        patch.setattr(Program, "__call__", FailsOnce(Program.__call__, RuntimeError("injected")))
        with pytest.raises(RuntimeError, match="injected"):
            run_call(focus, decided(ids, 4))
    with focus_compile.record() as history, torch.no_grad():
        focus(decided(ids))
    assert history[0].program == "step"
