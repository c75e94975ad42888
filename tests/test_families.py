"""Stock transformers: accepted and equal to the oracle, or refused with a reason that helps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import focus_compile
from focus_compile.fallback import FocusWarning
from tests import versions
from tests.compiled import compiled, run_call, seen_steps
from tests.graphs import rows_alone, trace
from tests.models import IMPLEMENTATIONS, STOCK, build_stock
from tests.oracle import Oracle
from tests.strategies import bound_from_float64, float64_twin

torch.set_num_threads(1)
MASK = 39
OPTIONS: dict[str, Any] = {
    "mask_token_id": MASK, "block_length": 4, "key_block": 2, "dense_layers": 0, "sink_tokens": 2,
    "window": 3, "expansion": 2, "keep_ratio": 0.5,
}  # fmt: skip


def trajectory(length: int = 20, prompt: int = 11) -> list[Tensor]:
    """Ids [2, T] of four calls: a prompt, then masks of which some are decided in each call."""
    truth = torch.randint(3, 38, (2, length), generator=torch.Generator().manual_seed(1))
    ids = torch.where(torch.arange(length) >= prompt, MASK, truth)
    calls = [ids]
    for decided in ([prompt + 1], [prompt, prompt + 3], [prompt + 2]):
        ids = ids.clone()
        ids[:, decided] = truth[:, decided]
        calls.append(ids)
    return calls


def families() -> list[Any]:
    """Every family in every implementation; all but SDPA are slow, except one."""
    cases = []
    for name in STOCK:
        for implementation in IMPLEMENTATIONS:
            slow = implementation != "sdpa" and (name, implementation) != ("bert", "eager")
            marks = [pytest.mark.slow] * slow
            if implementation == "flex_attention":
                marks.append(versions.flex_attention)
            cases.append(pytest.param(name, implementation, marks=marks))
    return cases


def assert_follows_oracle(model: nn.Module, judged: nn.Module, **inputs: Any) -> None:
    """Every call of the trajectory computes what the oracle says, with `judged` as its model."""
    oracle, focus = Oracle(judged, **OPTIONS), compiled(model, **OPTIONS)
    calls = trajectory()
    bound = 4 * bound_from_float64(judged, float64_twin(judged), calls[0], **inputs)
    programs = []
    with seen_steps() as seen:
        for ids in calls:
            expected = oracle.call(ids, **inputs)
            logits, record = run_call(focus, ids, **inputs)
            assert record.program == expected.program, record.why
            assert expected.margin > 1e-3, "choose another trajectory: this one is a tie"
            if record.program == "step":
                assert torch.equal(seen[-1].rows, expected.active)
                assert seen[-1].keys == expected.keys
            assert (logits - expected.logits).abs().max() <= bound
            programs.append(record.program)
    assert programs[:3] == ["refresh", "step", "step"]


@pytest.mark.parametrize(("name", "implementation"), families())
def test_steps_equal_the_oracle(name: str, implementation: str) -> None:
    assert_follows_oracle(build_stock(name, implementation), build_stock(name, "sdpa"))


@pytest.mark.slow
def test_experts_in_a_loop_run_exactly_and_say_what_to_set() -> None:
    """Which experts are hit depends on values, so Dynamo cuts the forward."""
    model: Any = build_stock("qwen3_moe", num_hidden_layers=1)
    model.set_experts_implementation("eager")
    reason = 'model.set_experts_implementation("grouped_mm")'
    assert_exact(model, trajectory()[0], reason=reason)


def test_a_sliding_window_is_a_mask_and_full_attention_is_none() -> None:
    (graph,) = trace(build_stock("modernbert"), trajectory()[0])
    assert [site.masked for site in graph.plan.sites] == [False, True, True]


@pytest.mark.parametrize("name", ["eurobert", "llama"])
def test_a_padding_mask_is_accepted_and_guarded(name: str) -> None:
    (graph,) = trace(
        build_stock(name), trajectory()[0], attention_mask=torch.ones(2, 20, dtype=torch.long)
    )
    assert not graph.reason
    assert all(site.masked for site in graph.plan.sites)
    (guarded,) = [role.name for role in graph.plan.inputs if role.role == "guarded"]
    assert "attention_mask" in guarded


def assert_exact(function: Any, *args: Any, reason: str, **inputs: Any) -> None:
    """Every graph of the call runs exactly, says `reason`, and returns the model's own values."""
    torch._dynamo.reset()
    expected = plain_call(function, *args, **inputs)
    focus = torch.compile(
        function, backend="focus", options={"mask_token_id": MASK, "lowering": "eager"}
    )
    with warnings.catch_warnings(record=True) as seen, focus_compile.record() as history:
        warnings.simplefilter("always")
        result = plain_call(focus, *args, **inputs)
    assert history
    assert {record.program for record in history} == {"exact"}
    assert any(reason in record.why for record in history)
    lines = [str(w.message) for w in seen if issubclass(w.category, FocusWarning)]
    assert any(reason in line for line in lines)
    assert not any("\n" in line for line in lines)
    assert not any("analysis" in line for line in lines)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def plain_call(function: Any, *args: Any, **inputs: Any) -> list[Tensor]:
    """Every tensor that the call returns."""
    with torch.no_grad():
        output = function(*args, **inputs)
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else vars(output).values()
    return [value for value in values if isinstance(value, Tensor)]


CALLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "cache": ("llama", {"use_cache": True}, "use_cache=False"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_for_more_than_logits_run_exactly(case: str) -> None:
    name, inputs, reason = CALLS[case]
    assert_exact(build_stock(name), trajectory()[0], reason=reason, **inputs)


def test_the_last_logits_alone() -> None:
    """The head's slice comes after its rows."""
    model, found = build_stock("llama"), []
    for inputs in ({}, {"logits_to_keep": 3}):
        focus = compiled(model, mask_token_id=MASK, strict=True)
        found.append([run_call(focus, ids, **inputs) for ids in trajectory()])
    assert "step" in [record.program for _, record in found[0]]
    for (every, one), (last, other) in zip(*found, strict=True):
        assert one.program == other.program
        torch.testing.assert_close(last, every[:, -3:])


@pytest.mark.parametrize("name", ["eurobert", "bert"])
def test_a_loss_is_that_of_the_latest_logits(name: str) -> None:
    """The labels are no part of the model: other ones end no trajectory."""
    model, ids = build_stock(name), trajectory()[0]
    focus = torch.compile(
        model, backend="focus", dynamic=False,
        options={"mask_token_id": MASK, "lowering": "eager", "block_length": 4},
    )  # fmt: skip
    with focus_compile.record() as history:
        for label in (5, 7):
            labels = torch.full((2, 20), label)
            loss, logits = plain_call(focus, ids, labels=labels)
            expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            torch.testing.assert_close(loss, expected)
            if label == 5:
                dense = plain_call(model, ids, labels=labels)
                torch.testing.assert_close([loss, logits], dense, rtol=1e-5, atol=1e-5)
            masks = (ids == MASK).nonzero()
            ids = ids.clone()
            ids[masks[0][0], masks[0][1]] = 3
    assert [record.program for record in history] == ["refresh", "step"]


def test_hidden_states_are_outputs_like_the_logits() -> None:
    """A row each: rows alone equal dense in every one of them.

    The first such call installs transformers' hooks, which breaks the graph; the second does not.
    """
    model, ids = build_stock("eurobert"), trajectory()[0]
    first = trace(model, ids, output_hidden_states=True)
    assert all(graph.reason for graph in first)
    (graph,) = trace(model, ids, output_hidden_states=True)
    assert len(graph.plan.outputs) == 5
    active = torch.zeros(2, 20, dtype=torch.bool)
    active[:, [0, 7]] = True
    compared = rows_alone(graph.programs(), graph.calls[0], active)
    assert len(compared) == 5
    for alone, dense in compared:
        torch.testing.assert_close(alone, dense, rtol=1e-5, atol=1e-5)


def test_embeddings_hold_no_ids() -> None:
    model = build_stock("eurobert")
    embeddings = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))
    assert_exact(
        model,
        inputs_embeds=embeddings,
        reason="inputs_embeds holds no ids to compare between calls",
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_causal_decoders_are_refused_as_causal(implementation: str) -> None:
    model = build_stock("llama", implementation, is_causal=True)
    assert_exact(model, trajectory()[0], reason="causal attention")


def test_attention_weights_returned_are_refused() -> None:
    model: nn.Module = build_stock("eurobert", "eager")
    (*graphs,) = trace(lambda ids: model(ids, output_attentions=True), trajectory()[0])
    assert all(graph.reason for graph in graphs)
    assert "the attention probabilities have 2 users" in graphs[0].reason
