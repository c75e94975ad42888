"""Rows computed alone over fresh K/V equal the same rows of dense; what mixes rows is refused.

A strict subset is what proves it: with all rows active, a token mixer outside attention would
still see every row.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from focus_compile.passes import token_rules
from tests.compiled import compiled, run_call
from tests.graphs import rows_alone, trace
from tests.models import (
    ATTENTIONS,
    MIXER_PLACES,
    MIXERS,
    NEAR_MISSES,
    UNMATCHED_ATTENTIONS,
    ModelSpec,
    build,
)
from tests.strategies import bound_from_float64, float64_twin, model_specs, seeds

torch.set_num_threads(1)


def property_test(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


OP_OF_MIXER = {
    "roll": "roll", "shift_cat": "cat", "flip": "flip", "neighbour_gather": "gather",
    "first_row": "expand", "scrambled_view": "reshape", "mean": "add", "max": "add",
    "cumsum": "cumsum", "sort": "sort", "softmax": "softmax", "token_layernorm": "layer_norm",
    "global_scale": "div", "conv1d": "conv1d", "token_linear": "linear", "fft": "fft_fft",
    "batch_mean": "add",
}  # fmt: skip
"""The op that each mixer is refused for; gru breaks the graph, and its parts are no models."""

QUICK: dict[str, Any] = {
    "norm": "functional_rmsnorm", "mlp": "gelu", "position": "learned", "hidden": 16,
}  # fmt: skip
"""A model of few ops, where only one of them matters."""


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Neither pads (0) nor masks (39), [B, T]."""
    return torch.randint(1, 39, (batch, length), generator=torch.Generator().manual_seed(seed))


def strict_subset(batch: int, length: int, seed: int) -> Tensor:
    """1 to length - 1 rows of each sequence, another number in each, bool [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.zeros(batch, length, dtype=torch.bool)
    for row in active:
        count = int(torch.randint(1, length, (), generator=generator))
        row[torch.randperm(length, generator=generator)[:count]] = True
    return active


def left_padding(batch: int, length: int) -> Tensor:
    """Attention mask int64 [B, T] that hides b tokens of sequence b."""
    return (torch.arange(length)[None] >= torch.arange(batch)[:, None]).long()


@st.composite
def confusing_lengths(draw: Any, spec: ModelSpec, batch: int) -> int:
    """Lengths equal to, or twice, another size of the model, or to none."""
    sizes = [spec.hidden, spec.heads, spec.head_dim, spec.kv_heads, batch, 2 * batch, spec.vocab]
    return draw(st.sampled_from([11, *(size for size in sizes if size > 1)]))


def assert_subset_equals_dense(
    model: nn.Module, calls: list[Tensor], seed: int, dynamic: bool, **inputs: Tensor
) -> None:
    """Every call shares one accepted graph; each is judged by its own float64 bound."""
    (graph,) = trace(model, *calls, dynamic_length=dynamic, **inputs)
    programs = graph.programs()
    twin = float64_twin(model)
    for ids, args in zip(calls, graph.calls, strict=True):
        active = strict_subset(*ids.shape, seed)
        bound = bound_from_float64(model, twin, ids, **inputs)
        for alone, dense in rows_alone(programs, args, active):
            error = (alone - dense).abs().max().item()
            assert error <= bound, f"{tuple(ids.shape)}: {error:g} > {bound:g}"


@property_test(8)
@given(model_specs(), st.integers(1, 3), seeds(), st.booleans(), st.data())
def test_rows_alone_equal_dense(
    spec: ModelSpec, batch: int, seed: int, dynamic: bool, data: st.DataObject
) -> None:
    length = data.draw(confusing_lengths(spec, batch))
    calls = [random_ids(batch, length, seed)]
    inputs = {}
    if spec.padding:
        inputs["attention_mask"] = left_padding(batch, length)
    elif dynamic:
        calls.append(random_ids(batch, length + 7, seed))
    assert_subset_equals_dense(build(spec, seed), calls, seed, dynamic, **inputs)


@pytest.mark.parametrize("near_miss", NEAR_MISSES)
def test_near_misses_are_accepted(near_miss: str) -> None:
    model = build(ModelSpec(near_miss=near_miss, head_dim=4, **QUICK))
    assert_subset_equals_dense(model, [random_ids(2, 9)], 0, dynamic=False)


@pytest.mark.parametrize("grouping", ["expand", "repeat_interleave"])
def test_flattened_heads_are_found_at_any_length(grouping: str) -> None:
    model = build(ModelSpec(attention="bmm", grouping=grouping, **QUICK))
    assert_subset_equals_dense(model, [random_ids(2, 9), random_ids(2, 14)], 0, dynamic=True)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_spelling_is_accepted_in_half_precision(attention: str) -> None:
    model = build(ModelSpec(attention=attention, **QUICK), dtype=torch.bfloat16)
    (graph,) = trace(model, random_ids(2, 9))
    for alone, dense in rows_alone(graph.programs(), graph.calls[0], strict_subset(2, 9, 0)):
        assert alone.dtype == torch.bfloat16
        assert (alone - dense).float().abs().max() <= 0.05 * dense.float().abs().max()


@pytest.mark.parametrize(
    "place",
    [pytest.param(p, marks=() if p == "residual" else pytest.mark.slow) for p in MIXER_PLACES],
)
@pytest.mark.parametrize("mixer", MIXERS)
def test_mixers_are_refused_by_name(mixer: str, place: str) -> None:
    if (mixer, place) == ("batch_mean", "flat"):
        pytest.skip("merged tokens have no batch to mix")
    spec = ModelSpec(mixer=mixer, mixer_place=place, flatten=place == "flat", **QUICK)
    graphs = trace(build(spec), random_ids(2, 11))
    assert all(graph.reason for graph in graphs)
    if mixer == "gru":
        return
    (refusal,) = graphs[0].call.refusals
    assert refusal.reason.startswith(OP_OF_MIXER[mixer] + ".")
    assert "not token-wise" in refusal.reason
    assert "mixers.py:" in refusal.where


@pytest.mark.slow
@property_test(6)
@given(
    model_specs(mixer=[mixer for mixer in MIXERS if mixer != "gru"]),
    st.integers(2, 3),
    st.booleans(),
    st.data(),
)
def test_no_length_lets_a_mixer_pass(
    spec: ModelSpec, batch: int, dynamic: bool, data: st.DataObject
) -> None:
    """Equal sizes of unrelated axes must not be taken for one another."""
    length = data.draw(confusing_lengths(spec, batch))
    (graph,) = trace(build(spec), random_ids(batch, length), dynamic_length=dynamic)
    assert "not token-wise" in graph.reason


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec(causal="is_causal", **QUICK),
        *(
            ModelSpec(causal="tril", attention=attention, mask_form=form, **QUICK)
            for attention in ("sdpa", "matmul")
            for form in ("additive", "bool", "masked_fill")
        ),
        ModelSpec(causal="tril", padding=True, **QUICK),
        ModelSpec(causal="tril", position="alibi"),
    ],
    ids=lambda spec: f"{spec.causal}-{spec.attention}-{spec.mask_form}-{spec.position}",
)
def test_causal_attention_is_refused_as_such(spec: ModelSpec) -> None:
    inputs = {"attention_mask": left_padding(2, 9)} if spec.padding else {}
    (graph,) = trace(build(spec), random_ids(2, 9), **inputs)
    assert graph.reason.startswith("causal attention")
    assert "attention.py:" in graph.call.refusals[0].where


def test_causal_attention_is_seen_at_any_length() -> None:
    (graph,) = trace(build(ModelSpec(causal="tril")), random_ids(2, 9), dynamic_length=True)
    assert graph.reason.startswith("causal attention")


@pytest.mark.parametrize("attention", UNMATCHED_ATTENTIONS)
def test_attention_of_another_kind_is_refused(attention: str) -> None:
    (graph,) = trace(build(ModelSpec(attention=attention, **QUICK)), random_ids(2, 9))
    assert graph.reason
    assert "analysis" not in graph.reason
    if attention in ("softcap", "sink"):
        assert "softmax" in graph.reason
        assert "attention.py:" in graph.reason


@pytest.mark.parametrize("mixer", ["roll", "flip", "cumsum", "sort", "softmax"])
def test_the_first_run_catches_mixers_that_the_proof_lets_pass(
    mixer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check can fail: without the proof, it alone keeps wrong logits from the user."""
    monkeypatch.setattr(token_rules, "_forbid", lambda *_: None)
    model = build(ModelSpec(mixer=mixer, **QUICK))
    ids = random_ids(2, 12)
    ids[:, 5:] = 39
    (graph,) = trace(model, ids)
    assert not graph.reason
    focus = compiled(model, mask_token_id=39, key_block=2)
    run_call(focus, ids)
    later = ids.clone()
    later[:, 6] = 7
    logits, record = run_call(focus, later)
    assert record.program == "exact"
    assert "first-run check: rows computed alone differ" in record.why
    with torch.no_grad():
        assert torch.equal(logits, model(later).logits)
