"""The compiled programs against the oracle and against dense attention, on generated models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.compiled import compiled, run_call, seen_steps
from tests.models import build
from tests.models.network import logits_of
from tests.models.spec import ModelSpec
from tests.oracle import Oracle
from tests.strategies import (
    EVERYTHING,
    Trajectory,
    bound_from_float64,
    float64_twin,
    model_specs,
    policy_options,
    seeds,
    trajectories,
)

torch.set_num_threads(1)
property_test = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
CLEAR_MARGIN = 1e-3
"""A choice whose runner-up is closer than this may differ by rounding."""


def dense_of(model: Any, ids: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model(ids, **inputs))


def keeps_everything(trajectory: Trajectory) -> bool:
    """Whether a window around any mask covers all: some mask in every sequence of every call."""
    return all((ids == trajectory.mask_token_id).any(1).all() for ids in trajectory.calls)


def real_rows(trajectory: Trajectory) -> torch.Tensor:
    """Padding rows attend to nothing; their logits mean nothing."""
    mask = trajectory.attention_mask
    shape = trajectory.calls[0].shape
    return torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()


@property_test
@given(model_specs(), trajectories(), seeds(), policy_options(**EVERYTHING))
def test_everything_active_and_kept_equals_dense(
    spec: ModelSpec, trajectory: Trajectory, seed: int, drawn: dict[str, Any]
) -> None:
    """Stale K/V of other rows cannot exist where all rows are active at every step."""
    model = build(spec, seed)
    focus = compiled(model, mask_token_id=trajectory.mask_token_id, **drawn)
    twin = float64_twin(model)
    if not keeps_everything(trajectory):
        return
    for ids in trajectory.calls:
        logits, record = run_call(focus, ids, **trajectory.inputs)
        assert record.program in ("refresh", "step"), record.why
        bound = bound_from_float64(model, twin, ids, **trajectory.inputs)
        error = (logits - dense_of(model, ids, trajectory.inputs)).abs().max()
        assert error <= bound, f"{record.program}: {error:g} > {bound:g}"


@property_test
@given(model_specs(), trajectories(), seeds(), policy_options(refresh="every-step", logits="all"))
def test_refresh_every_step_equals_dense(
    spec: ModelSpec, trajectory: Trajectory, seed: int, drawn: dict[str, Any]
) -> None:
    model = build(spec, seed)
    focus = compiled(model, mask_token_id=trajectory.mask_token_id, **drawn)
    twin = float64_twin(model)
    for ids in trajectory.calls:
        logits, record = run_call(focus, ids, **trajectory.inputs)
        assert record.program == ("refresh" if (ids == trajectory.mask_token_id).any() else "exact")
        bound = bound_from_float64(model, twin, ids, **trajectory.inputs)
        error = (logits - dense_of(model, ids, trajectory.inputs)).abs().max()
        assert error <= bound, f"{error:g} > {bound:g}"


def assert_follows_oracle(
    model: Any, focus: Any, trajectory: Trajectory, drawn: dict[str, Any], bound: float
) -> int:
    """Compare call by call, rows and keys included; returns the number of steps compared."""
    oracle = Oracle(model, mask_token_id=trajectory.mask_token_id, **drawn)
    compared = 0
    with seen_steps() as seen:
        for ids in trajectory.calls:
            seen.clear()
            expected = oracle.call(ids, **trajectory.inputs)
            logits, record = run_call(focus, ids, **trajectory.inputs)
            assert record.program == expected.program, record.why
            if expected.margin < CLEAR_MARGIN:
                return compared
            if record.program == "step" and not expected.active.any():
                assert not seen  # a repeated call computes nothing
            elif record.program == "step":
                step = seen[-1]
                assert torch.equal(step.rows, expected.active)
                if "sparse-suffix" in record.keys:
                    assert step.sinks == expected.sinks
                assert step.keys == expected.keys
                assert record.rows == int(expected.active.sum())
                compared += 1
            first = oracle.rows_returned(record.program)
            assert not logits[:, :first].any()
            error = (logits - expected.logits)[:, first:][real_rows(trajectory)[:, first:]]
            error = error.abs().max()
            assert error <= bound, f"{record.program}: {error:g} > {bound:g}"
    return compared


@pytest.mark.parametrize("policy", ["focus-dllm", "dual-cache", "prefix-cache"])
@property_test
@given(
    model_specs(separating=True),
    trajectories(padded=None, min_length=8),
    seeds(),
    st.data(),
)
def test_steps_follow_the_oracle(
    policy: str, spec: ModelSpec, trajectory: Trajectory, seed: int, data: st.DataObject
) -> None:
    """Which rows, which keys, and the logits: equal to the slow implementation, step by step."""
    if trajectory.attention_mask is not None and not spec.padding:
        return
    model = build(spec, seed)
    drawn = data.draw(policy_options(policy=policy))
    focus = compiled(model, mask_token_id=trajectory.mask_token_id, **drawn)
    twin = float64_twin(model)
    bound = 4 * bound_from_float64(model, twin, trajectory.calls[0], **trajectory.inputs)
    assert_follows_oracle(model, focus, trajectory, drawn, bound)
