"""`guard=`: what guarded calls return, what they count, and how the runtime backs off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import focus_compile
from focus_compile.runtime.quality_guard import (
    EVERY,
    FEWEST,
    LEVELS,
    PROBATION,
    Check,
    QualityGuard,
    check_answers,
)
from focus_compile.runtime.store import STORE
from tests.compiled import compiled, run_call
from tests.models import build
from tests.models.spec import ModelSpec
from tests.runtime.tiny import MASK, OPTIONS, decided, prompt, tiny_model
from tests.strategies import (
    Trajectory,
    bound_from_float64,
    float64_twin,
    model_specs,
    policy_options,
    seeds,
    trajectories,
)
from tests.test_policies_against_oracle import dense_of, property_test


@settings(property_test, max_examples=5)
@given(model_specs(), trajectories(), seeds(), policy_options(logits="all"))
def test_guarding_every_call_equals_dense(
    spec: ModelSpec, trajectory: Trajectory, seed: int, drawn: dict[str, Any]
) -> None:
    model = build(spec, seed)
    focus = compiled(model, mask_token_id=trajectory.mask_token_id, guard=1.0, **drawn)
    twin = float64_twin(model)
    for ids in trajectory.calls:
        logits, record = run_call(focus, ids, **trajectory.inputs)
        assert record.program in ("refresh", "exact") or record.rows == 0
        bound = bound_from_float64(model, twin, ids, **trajectory.inputs)
        assert (logits - dense_of(model, ids, trajectory.inputs)).abs().max() <= bound


def decode(focus: Any, ids: Tensor) -> tuple[Tensor, list[Any]]:
    """Decide the most probable mask with its own token, call by call; the calls' records."""
    records = []
    ids = ids.clone()
    while (ids == MASK).any():
        logits, record = run_call(focus, ids)
        records.append(record)
        logits[..., MASK] = -torch.inf
        top, token = logits.softmax(-1).max(-1)
        at = top.masked_fill(ids != MASK, -1).argmax(1, keepdim=True)
        ids.scatter_(1, at, token.gather(1, at))
    return ids, records


def test_guarded_calls_say_what_they_found_and_cost() -> None:
    model, ids = tiny_model(), prompt(length=40, masks=12)
    _, records = decode(compiled(model, **OPTIONS, guard=0.5), ids)
    guarded = [r for r in records if r.why == "guard"]
    assert guarded
    assert len(guarded) < len([r for r in records if r.why != "block entry"])
    assert all(0 <= r.agreement <= 1 and r.drift >= 0 and r.rows > 40 for r in guarded)
    assert all(r.agreement is None for r in records if r.why != "guard")
    found = STORE.guard(next(model.parameters()))
    assert found.checks == len(guarded)
    assert found.guard_rows == sum(r.rows for r in guarded) - sum(r.rows - 40 for r in guarded)
    assert 0 < found.cost < 1
    assert f"guard: {len(guarded)} of" in str(
        focus_compile.explain(model, ids, quiet=True, **OPTIONS, guard=0.5)
    )


def test_a_bar_that_is_missed_ends_in_dense_answers() -> None:
    """Steps that read next to nothing: their answers part from dense ones."""
    model, ids = tiny_model(seed=3), prompt(length=120, masks=60, batch=2)
    poor = OPTIONS | {"keep_ratio": 0.0, "sink_tokens": 0, "refresh": 10_000, "window": 1}
    focus = compiled(model, **poor, guard=0.5, guard_agreement=1.0)
    _, records = decode(focus, ids)
    guard = STORE.guard(next(model.parameters()))
    assert guard.level == len(LEVELS) - 1
    whys = [r.why for r in records]
    first = whys.index(f"the guard: {LEVELS[3]}")
    assert all(r.program == "refresh" for r in records[first:])
    assert any(r.agreement is not None and r.agreement < 1 for r in records[:first])
    torch.compiler.reset()
    assert STORE.guard(next(model.parameters())).level == 0


def test_all_keys_are_read_from_the_second_level_on() -> None:
    model, ids = tiny_model(), prompt(length=40, masks=8)
    focus = compiled(model, **OPTIONS, guard=1e-9)
    run_call(focus, ids)
    STORE.guard(next(model.parameters())).level = 1
    _, record = run_call(focus, decided(ids))
    assert record.program == "step"
    assert set(record.keys.values()) == {40}


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 1.0), st.integers(1, 40))
def test_guarded_calls_are_spread_evenly(share: float, period: int) -> None:
    """In the whole and at every offset of a loop's period."""
    guard = QualityGuard()
    due = [guard.due(share) for _ in range(40 * 100)]
    assert abs(sum(due) / len(due) - share) < 0.01
    at_offset = due[::period]
    assert abs(sum(at_offset) / len(at_offset) - share) < 0.25


def test_levels_rise_below_the_bar_and_are_tried_again() -> None:
    guard = QualityGuard()
    for _ in range(FEWEST - 1):
        guard.note(Check(0.0, 0.5, 1), 0.9)
    assert guard.level == 0
    guard.note(Check(0.0, 0.5, 1), 0.9)
    assert guard.level == 1
    assert guard.agreement is None
    guard.note(Check(1.0, 0.0, 9), 0.9)
    assert guard.level == 1
    guard.note(Check(0.0, 0.0, 2), 0.9)
    assert guard.level == 2
    assert guard.backs_off(EVERY - 1)
    assert not guard.backs_off(EVERY - 2)
    assert [guard.reads_all_keys() for _ in range(PROBATION)] == [True] * PROBATION
    assert guard.level == 2
    guard.reads_all_keys()
    assert guard.level == 1
    assert not guard.refreshes()


def test_only_what_would_be_decided_is_judged() -> None:
    confidence = torch.tensor([[0.9, 0.5, 0.8, 0.99], [0.1, 0.2, 0.3, 0.4]])
    focus = torch.tensor([[True, True, True, False], [False, False, True, False]])
    token = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    dense = confidence - 0.1, torch.tensor([[1, 9, 9, 9], [9, 9, 7, 9]])
    one = check_answers(focus, 1, (confidence, token), dense)
    assert one == Check(1.0, pytest.approx(0.1), 2)
    two = check_answers(focus, 2, (confidence, token), dense)
    assert two == Check(pytest.approx(2 / 3), pytest.approx(0.1), 3)
    none = check_answers(torch.zeros(2, 4).bool(), 2, (confidence, token), dense)
    assert none == Check(0.0, 0.0, 0)
