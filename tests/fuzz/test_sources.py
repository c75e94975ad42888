"""What is generated: modules that run in every spelling, and cases that survive JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from focus_compile.passes.block_causality import block_causal_mask
from tests.fuzz.architecture import CHOICES, MASK, VOCAB, Architecture
from tests.fuzz.case import Case, architectures, cases
from tests.fuzz.source import imported, made, source_of
from tests.models.network import logits_of

torch.set_num_threads(1)
IDS = torch.randint(1, MASK, (2, 9), generator=torch.Generator().manual_seed(0))
PADDING = torch.ones_like(IDS).index_put_((torch.tensor(0), torch.arange(3)), torch.tensor(0))
NEEDS: dict[str, dict[str, Any]] = {
    "gate_up": {"mlp": "swiglu"},
    "grouping": {"groups": 2},
    "wide_values": {"groups": 2},
    "score_cap": {"attention": "softmax"},
    "softmax_dtype": {"attention": "softmax"},
    "mask_form": {"padding": True},
    "window_form": {"window": "all"},
    "window_tokens": {"window": "all"},
    "position_table": {"position": "learned"},
    "shared_expert": {"moe": "soft"},
}
"""What a field needs to matter."""
SINGLE = [(name, value) for name, values in CHOICES.items() for value in dict.fromkeys(values)]


@torch.no_grad()
def logits(architecture: Architecture) -> torch.Tensor:
    mask = block_causal_mask(9, 3) if architecture.block_causal else PADDING
    with imported(source_of(architecture)) as module:
        return logits_of(made(module, 0)(IDS, attention_mask=mask))


@pytest.mark.parametrize(("name", "value"), SINGLE, ids=[f"{n}-{v}" for n, v in SINGLE])
def test_every_choice_is_a_model(name: str, value: Any) -> None:
    architecture = Architecture(**{**NEEDS.get(name, {}), name: value})
    found = logits(architecture)
    assert found.shape == (2, 9, VOCAB)
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"attention": "sdpa"}, {"attention": attention})
        for attention in ("softmax", "bmm", "baddbmm", "einsum", "einsum_tokens_first", "exp",
                          "grouped_einsum")
    ]
    + [({"grouping": "repeat_interleave"}, {"grouping": "expand"}),
       ({"scaling": "mul"}, {"scaling": "both"}), ({"rope_place": "heads_first"},
        {"rope_place": "tokens_first"}), ({"mask_form": "additive"}, {"mask_form": "bool"}),
       ({"rope_style": "interleaved"}, {"rope_style": "complex"}),
       ({"position_table": "computed"}, {"position_table": "buffer"}),
       ({"moe": "mask"}, {"moe": "gather"})],
    ids=str,
)  # fmt: skip
def test_spellings_of_one_function_agree(first: dict[str, Any], second: dict[str, Any]) -> None:
    common = {"groups": 2, "padding": True}
    a, b = (logits(Architecture(**common, **own)) for own in (first, second))
    real = PADDING.bool()
    torch.testing.assert_close(a[real], b[real], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "impossible",
    [
        {"qkv": "unbind", "groups": 2},
        {"grouping": "enable_gqa", "attention": "softmax"},
        {"score_cap": True},
        {"attention": "grouped_einsum", "position": "alibi"},
        {"norm": "batchnorm"},
    ],
    ids=str,
)
def test_impossible_architectures_raise(impossible: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Architecture(**impossible)


@settings(max_examples=30, deadline=None)
@given(architecture=architectures())
def test_drawn_architectures_run(architecture: Architecture) -> None:
    assert logits(architecture).shape == (2, 9, VOCAB)


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_cases_survive_json(case: Case) -> None:
    again = Case.from_json(case.to_json())
    assert again == case
    first, second = case.calls()[0], again.calls()[0]
    assert all(map(torch.equal, first.calls, second.calls))


def test_every_field_has_choices() -> None:
    assert set(CHOICES) == {field.name for field in dataclasses.fields(Architecture)}
