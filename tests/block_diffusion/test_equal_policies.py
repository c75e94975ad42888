"""Where policies must agree with one another, and with a loop that has no cache at all."""

from __future__ import annotations

import copy
import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import nn

from focus_compile.passes.block_causality import block_causal_mask
from tests.block_diffusion.test_against_oracle import prompts
from tests.block_diffusion.tiny import MASK, decoder, generate, generator, oracle

BLOCK = 8
few = settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def run(model: nn.Module, prompt: list[int], tokens: int, **options: Any) -> tuple[Any, Any]:
    """(tokens, what each step computed)"""
    made = generator(model, block_length=BLOCK, max_batch=1, **options)
    [completion] = generate(made, [prompt], tokens)
    return completion.tokens, [(s.listed, s.kept, s.decoded) for s in made.history]


def clear(model: nn.Module, prompt: list[int], tokens: int, **options: Any) -> bool:
    return oracle(model, block_length=BLOCK, **options).generate(prompt, tokens).clear


@given(prompt=prompts(), tokens=st.integers(1, 20), threshold=st.sampled_from((0.3, 0.9)))
@few
def test_an_endless_budget_is_the_delayed_cache(
    prompt: list[int], tokens: int, threshold: float
) -> None:
    """By one graph (infinity) or by two, all of whose rows go on (as large as the block)."""
    model = decoder("qwen3")
    options = {"threshold": threshold}
    assume(clear(model, prompt, tokens, policy="delayed-cache", **options))
    expected = run(model, prompt, tokens, policy="delayed-cache", **options)
    for alpha in (math.inf, float(BLOCK)):
        assert run(model, prompt, tokens, policy="focus-evict", alpha=alpha, **options) == expected


def without_caches(model: nn.Module, prompt: list[int], tokens: int, threshold: float) -> list[int]:
    """The model's own forward over all tokens in every step."""
    ids = list(prompt)
    begin = len(prompt) // BLOCK * BLOCK
    while len(ids) < len(prompt) + tokens:
        ids += [MASK] * (begin + BLOCK - len(ids))
        while MASK in ids:
            mask = block_causal_mask(len(ids), BLOCK)
            with torch.no_grad():
                output = model(torch.tensor([ids]), attention_mask=mask, use_cache=False)
            logits = output.logits[0].float()
            logits[:, MASK] = -math.inf
            best, token = logits.softmax(-1).max(-1)
            open_ = [p for p in range(begin, len(ids)) if ids[p] == MASK]
            first = max(open_, key=lambda p: (float(best[p]), -p))
            for p in open_:
                if p == first or best[p] >= threshold:
                    ids[p] = int(token[p])
        begin += BLOCK
    return ids[len(prompt) :][:tokens]


@given(
    name=st.sampled_from(("qwen3", "qwen2", "llama")),
    prompt=prompts(),
    tokens=st.integers(1, 20),
    threshold=st.sampled_from((0.3, 0.6, 1.0)),
)
@few
def test_block_diffusion_is_the_loop_without_caches(
    name: str, prompt: list[int], tokens: int, threshold: float
) -> None:
    model, options = decoder(name), {"policy": "block-diffusion", "threshold": threshold}
    assume(clear(model, prompt, tokens, **options))
    found, _ = run(model, prompt, tokens, **options)
    assert list(found) == without_caches(model, prompt, tokens, threshold)


@pytest.fixture(scope="module")
def unmixed() -> nn.Module:
    """Attention changes the hidden states of the last layer alone, so that K/V of a row depend on
    nothing but its token and position."""
    model = copy.deepcopy(decoder("qwen3", seed=1))
    for layer in list(model.model.layers)[:-1]:
        layer.self_attn.o_proj.weight.data.zero_()
    return model


@given(
    prompt=prompts(),
    tokens=st.integers(1, 20),
    threshold=st.sampled_from((0.3, 0.6, 1.0)),
    commit=st.sampled_from(("exact", "delayed")),
)
@few
def test_the_delayed_cache_is_exact_where_rows_do_not_read_one_another(
    unmixed: nn.Module, prompt: list[int], tokens: int, threshold: float, commit: str
) -> None:
    """What it approximates is K/V of frozen rows, as of when others in the block were masked."""
    options = {"threshold": threshold}
    assume(clear(unmixed, prompt, tokens, policy="block-diffusion", **options))
    expected, steps = run(unmixed, prompt, tokens, policy="block-diffusion", **options)
    found, cached = run(unmixed, prompt, tokens, policy="delayed-cache", commit=commit, **options)
    assert found == expected
    assert [decoded for _, _, decoded in cached] == [decoded for _, _, decoded in steps]
    assert all(a[0] <= b[0] for a, b in zip(cached, steps, strict=True))


def test_the_delayed_cache_is_exact_until_a_row_is_frozen_and_not_after() -> None:
    """At one token a step, too: the frozen rows of a block do not see what it decodes later."""
    model, prompt = decoder("qwen3"), [3, 1, 4, 1, 5]
    options = {"block_length": BLOCK, "threshold": 1.0}
    whole = oracle(model, policy="block-diffusion", **options).generate(prompt, 3).steps
    cached = oracle(model, policy="delayed-cache", **options).generate(prompt, 3).steps
    assert [len(step.listed) for step in cached[:2]] == [8, 4]
    apart = [
        max(float((a.logits[p] - b.logits[p]).abs().max()) for p in b.logits)
        for a, b in zip(whole[:2], cached[:2], strict=True)
    ]
    assert apart[0] < 1e-4
    assert apart[1] > 1e-2
