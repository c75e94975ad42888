"""Every policy against `tests.block_oracle`: tokens, and the rows of every step."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings

from tests.block_diffusion.tiny import (
    DENSE_POLICIES,
    MASK,
    Watch,
    decoder,
    generate,
    generator,
    oracle,
)
from tests.block_oracle import OracleStep, Run

# name of the model, cut: grouped heads, equal heads, one kv head and a later cut
MODELS = (("qwen3", 1), ("qwen2", 1), ("llama", 2))


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Any]:
    """Options of both the generator and the oracle."""
    name, cut = draw(st.sampled_from(MODELS))
    return {
        "name": name,
        "cut": cut,
        "block_length": draw(st.sampled_from((8, 4))),
        "policy": draw(st.sampled_from(DENSE_POLICIES)),
        "alpha": draw(st.sampled_from((1.5, 1.0, 2.5, 8.0, math.inf))),
        "threshold": draw(st.sampled_from((0.3, 0.6, 0.9, 1.0, 0.0))),
        "commit": draw(st.sampled_from(("exact", "delayed"))),
    }


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    length = draw(st.integers(1, 20))
    return draw(st.lists(st.integers(0, MASK - 1), min_size=length, max_size=length))


def same_step(found: Any, expected: OracleStep) -> None:
    assert found.listed == expected.listed
    assert found.kept == expected.kept
    assert found.decoded == expected.decoded
    assert sorted(found.logits) == sorted(expected.logits)
    for position, logits in expected.logits.items():
        torch.testing.assert_close(found.logits[position], logits, rtol=1e-4, atol=1e-4)


def compare(choice: dict[str, Any], prompt: list[int], tokens: int, **more: Any) -> Run:
    """One run of each; the rows of all steps, their logits, and the tokens are the same."""
    options = {name: value for name, value in choice.items() if name not in ("name", "keys")}
    model, keys = decoder(choice["name"]), choice.get("keys", {})
    expected = oracle(model, **options, **keys).generate(prompt, tokens)
    assume(expected.clear)
    made = generator(model, max_batch=2, key_options=keys, **options, **more)
    watch = Watch(made)
    [completion] = generate(made, [prompt], tokens)
    for found, wanted in zip(watch.steps[0], expected.steps, strict=True):
        same_step(found, wanted)
    assert list(completion.tokens) == expected.tokens
    assert completion.steps == len(expected.steps)
    assert completion.reason == "length"
    for step, wanted in zip(made.history, expected.steps, strict=True):
        assert (step.sequences, step.listed, step.kept) == (1, len(wanted.listed), len(wanted.kept))
        assert step.decoded == len(wanted.decoded)
    return expected


@given(choice=choices(), prompt=prompts(), tokens=st.integers(1, 20))
@settings(
    max_examples=20,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_one_sequence_step_by_step(choice: dict[str, Any], prompt: list[int], tokens: int) -> None:
    compare(choice, prompt, tokens)
