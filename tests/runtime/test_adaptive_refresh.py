"""`refresh="adaptive"`: what a block entry renews, what it leaves, and what it says of that."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

import focus_compile
from focus_compile.fallback import FocusWarning
from focus_compile.lowering.program import Program
from focus_compile.runtime.store import STORE
from tests.compiled import compiled, run_call
from tests.models import build
from tests.models.spec import ModelSpec
from tests.runtime.tiny import OPTIONS, assert_own, decided, prompt, tiny_model
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

few = settings(property_test, max_examples=5)
ADAPTIVE = OPTIONS | {"refresh": "adaptive", "block_length": 2}


@few
@given(model_specs(), trajectories(), seeds(), policy_options(refresh="block"))
def test_without_tolerance_it_is_the_block_refresh(
    spec: ModelSpec, trajectory: Trajectory, seed: int, drawn: dict[str, Any]
) -> None:
    model = build(spec, seed)
    block = compiled(model, mask_token_id=trajectory.mask_token_id, **drawn)
    expected = [run_call(block, ids, **trajectory.inputs) for ids in trajectory.calls]
    options = drawn | {"refresh": "adaptive", "tolerance": 0.0}
    focus = compiled(model, mask_token_id=trajectory.mask_token_id, **options)
    for ids, (logits, record) in zip(trajectory.calls, expected, strict=True):
        found, ours = run_call(focus, ids, **trajectory.inputs)
        assert torch.equal(found, logits)
        assert (ours.program, ours.rows) == (record.program, record.rows)


@few
@given(
    model_specs(), trajectories(), seeds(), policy_options(refresh="adaptive"), st.integers(1, 9)
)
def test_all_rows_renewed_equal_dense(
    spec: ModelSpec, trajectory: Trajectory, seed: int, drawn: dict[str, Any], max_age: int
) -> None:
    """With all of the prompt as its share, a partial refresh is a whole one."""
    model = build(spec, seed)
    options = drawn | {"refresh_rows": 1.0, "tolerance": 1e9, "max_age": max_age}
    focus = compiled(model, mask_token_id=trajectory.mask_token_id, **options)
    twin = float64_twin(model)
    for ids in trajectory.calls:
        logits, record = run_call(focus, ids, **trajectory.inputs)
        if record.program == "partial":
            assert record.error == 0
            bound = bound_from_float64(model, twin, ids, **trajectory.inputs)
            error = (logits - dense_of(model, ids, trajectory.inputs)).abs()
            first = _first_row(model, drawn)
            assert error[:, first:].max() <= bound


def _first_row(model: Any, drawn: dict[str, Any]) -> int:
    held = STORE.slot(next(model.parameters())).trajectory
    return 0 if held is None or drawn["logits"] == "all" else held.first_row


def entries(focus: Any, length: int = 40, masks: int = 8) -> list[Any]:
    """Records of a loop that decides a token a call."""
    ids, records = prompt(masks=masks, length=length), []
    for _ in range(masks):
        records.append(run_call(focus, ids)[1])
        ids = decided(ids)
    return records


def test_block_entries_renew_a_share_of_the_prompt() -> None:
    model = tiny_model()
    records = entries(compiled(model, **ADAPTIVE, tolerance=10.0, refresh_rows=0.5))
    assert [r.program for r in records] == ["refresh"] + ["step", "partial"] * 3 + ["step"]
    for record in records:
        if record.program == "partial":
            assert record.why == "block entry"
            assert 0 < record.prompt_rows < 32
            assert record.error is not None
    assert records[0].prompt_rows == 32


def test_too_large_an_error_renews_all() -> None:
    model = tiny_model()
    records = entries(compiled(model, **ADAPTIVE, tolerance=1e-9, refresh_rows=0.1))
    assert [r.program for r in records] == ["refresh"] + ["step", "refresh"] * 3 + ["step"]
    assert "the rest of the prompt would cost an error of" in records[2].why
    assert records[2].prompt_rows > 32


def test_a_repeated_call_is_answered_from_what_is_known() -> None:
    model = tiny_model()
    focus = compiled(model, **ADAPTIVE, tolerance=10.0)
    ids = prompt(length=40, masks=8)
    run_call(focus, ids)
    ids = decided(ids, 2)
    first, record = run_call(focus, ids)
    assert record.program == "partial"
    again, repeated = run_call(focus, ids)
    assert repeated.rows == 0
    assert torch.equal(first, again)


def test_a_wrong_partial_refresh_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Program.__call__

    def wrong(program: Program, *args: Any) -> tuple[Any, ...]:
        outputs = call(program, *args)
        if program.name == "partial refresh":
            outputs[0][:, -1] *= 1.01
        return outputs

    monkeypatch.setattr(Program, "__call__", wrong)
    model, ids = tiny_model(), prompt()
    focus = compiled(model, **ADAPTIVE)
    with pytest.warns(FocusWarning, match="rows computed alone differ"), torch.no_grad():
        assert_own(focus(ids), model, ids)
    assert run_call(focus, decided(ids))[1].program == "exact"


def test_explain_says_so() -> None:
    ids = prompt(length=40, masks=8)
    said = focus_compile.explain(tiny_model(), ids, quiet=True, **ADAPTIVE)
    assert "a block entry may refresh some rows of the prompt" in str(said)
    assert said.to_dict()["graphs"][0]["partial_refresh"]


def test_other_policies_of_blocks_have_none() -> None:
    """A finished block of a block-causal model is final."""
    with pytest.raises(focus_compile.OptionError, match="refresh"):
        focus_compile.compile(tiny_model(), policy="focus-dllm+evict", refresh="adaptive")


def test_keys_and_values_are_written_where_they_lie() -> None:
    """No cache is copied: attention reads what came in. Inductor would move the probes' reads
    behind the writes, which then need copies."""
    focus = compiled(tiny_model(), lowering="inductor", **ADAPTIVE)
    _, sources = run_and_get_code(lambda: run_call(focus, prompt(masks=8, length=40)))
    source = next(source for source in sources if "staleness.default(" in source)
    read = re.findall(r"attention_with_lse\.default\(\w+, (\w+), (\w+),", source)
    assert len(read) == 2
    assert all(name.startswith("arg") for names in read for name in names), read
