"""The first run of a plan is compared with the model, and a plan that differs is never used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile.errors import SelfCheckError
from focus_compile.fallback import FocusWarning
from focus_compile.lowering.program import Program
from focus_compile.runtime import dispatch
from focus_compile.runtime.self_check import _random_strict_subset, _worst_row
from tests.compiled import compiled, run_call
from tests.runtime.tiny import OPTIONS, assert_own, decided, prompt, tiny_model


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes one kind of program return wrong values in its last row."""

    def broken(name: str) -> None:
        call = Program.__call__

        def wrong(program: Program, *args: Any) -> tuple[Any, ...]:
            outputs = call(program, *args)
            if program.name == name:
                outputs[0][:, -1] *= 1.01
            return outputs

        monkeypatch.setattr(Program, "__call__", wrong)

    return broken


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("refresh", "the refresh program differs from the model by 0.01"),
        ("step", "rows computed alone differ from the model by 0.01"),
    ],
)
def test_a_wrong_program_is_never_used(
    broken: Callable[[str], None], program: str, message: str
) -> None:
    broken(program)
    model = tiny_model()
    focus, ids = compiled(model, **OPTIONS), prompt()
    with pytest.warns(FocusWarning, match=message), torch.no_grad():
        assert_own(focus(ids), model, ids)
    for _ in range(2):
        ids = decided(ids)
        logits, record = run_call(focus, ids)
        assert record.program == "exact"
        assert message in record.why
        assert_own(logits, model, ids)


@pytest.mark.parametrize("logits", ["all", "response"])
def test_without_memory_for_the_models_forward_rows_are_checked_against_the_refresh(
    broken: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, logits: str
) -> None:
    class NoMemory:
        def forward(self, *_: Any) -> Any:
            raise torch.OutOfMemoryError("injected")

    check = dispatch.check_plan
    monkeypatch.setattr(dispatch, "check_plan", lambda p, _, *rest: check(p, NoMemory(), *rest))
    assert (
        run_call(compiled(tiny_model(), **OPTIONS, logits=logits), prompt())[1].program != "exact"
    )
    broken("step")
    focus: Any = compiled(tiny_model(), **OPTIONS, logits=logits)
    with pytest.warns(FocusWarning, match="rows computed alone differ"), torch.no_grad():
        focus(prompt())


def test_strict_raises_every_time(broken: Callable[[str], None]) -> None:
    """Not only at the first call: whoever catches the error must not get wrong answers later."""
    broken("step")
    focus: Any = compiled(tiny_model(), **OPTIONS, strict=True)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(SelfCheckError, match="first-run check: rows"):
            focus(prompt())


def test_a_right_program_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    check = dispatch.check_plan
    monkeypatch.setattr(dispatch, "check_plan", lambda *a: calls.append(1) or check(*a))
    focus: Any = compiled(tiny_model(), **OPTIONS)
    with focus_compile.record() as history, torch.no_grad():
        for seed in range(3):
            focus(prompt(seed=seed))
    assert [entry.program for entry in history] == ["refresh"] * 3
    assert len(calls) == 1


@pytest.mark.parametrize(("batch", "length"), [(1, 2), (3, 5), (2, 64)])
def test_the_subset_is_strict(batch: int, length: int) -> None:
    for first in {0, length - 2}:
        chosen = _random_strict_subset(torch.zeros(batch, length), first)
        assert not chosen[:, :first].any()
        assert ((chosen.sum(1) >= 1) & (chosen.sum(1) < length - first)).all()


def test_the_error_is_that_of_the_worst_row() -> None:
    theirs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    ours: Tensor = theirs.clone()
    assert _worst_row(ours, theirs) == 0
    ours[1, 3] *= 1.5
    assert _worst_row(ours, theirs) == pytest.approx(0.5)
    ours[0, 0, 0] = torch.nan
    assert not _worst_row(ours, theirs) <= 1e9
