"""The combined policy: keys are chosen and rows leave, and what is finished stays the model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor, nn

import focus_compile
from focus_compile.config import COMBINED, FocusConfig
from focus_compile.errors import OptionError
from focus_compile.passes.block_causality import block_causal_mask
from focus_compile.runtime.store import STORE
from tests.block_diffusion.test_against_oracle import compare, prompts, same_step
from tests.block_diffusion.test_dispatch import OPTIONS, B, best, call, decode
from tests.block_diffusion.test_dispatch import prompts as prompts_of
from tests.block_diffusion.tiny import MASK, Watch, decoder, generate, generator, oracle
from tests.compiled import compiled

KEYS: dict[str, Any] = {"key_block": 4, "sink_tokens": 3, "dense_layers": 1}
few = settings(
    max_examples=6,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def sized(model: Any) -> Callable[..., Any]:
    """The model, traced for all lengths at once."""

    def run(ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **named: Any) -> Any:
        for tensor, axes in ((ids, [1]), (position_ids, [1]), (attention_mask, [2, 3])):
            torch._dynamo.mark_dynamic(tensor, axes)
        return model(ids, attention_mask=attention_mask, position_ids=position_ids, **named)

    return run


def assert_finished_is_the_models(model: nn.Module, ids: Tensor, logits: Tensor) -> None:
    """K/V of finished blocks, and their logits, are those of the model's own forward."""
    done = ids.shape[1] - B
    mask = block_causal_mask(done, B).expand(len(ids), -1, -1, -1)
    with torch.no_grad():
        own = model(ids[:, :done], attention_mask=mask, use_cache=True)
    torch.testing.assert_close(logits[:, :done], own.logits, rtol=1e-3, atol=1e-4)
    held: Any = STORE.slot(next(model.parameters())).trajectory
    for at, layer in enumerate(own.past_key_values.layers):
        for mine, theirs in zip(
            held.caches[2 * at : 2 * at + 2], (layer.keys, layer.values), strict=True
        ):
            torch.testing.assert_close(mine[:, :, :done], theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "batch", "alpha", "keys"),
    [
        ("qwen3", 2, 1.0, {}),
        ("llama", 1, math.inf, {"block_summary": "mean", "dense_tail_layers": 1, "key_block": 3}),
    ],
)
def test_a_caller_s_loop_decodes_as_the_oracle(
    name: str, batch: int, alpha: float, keys: dict[str, Any]
) -> None:
    """One token a call: then no sequence's yield depends on the others'. After every call,
    finished blocks are exact."""
    model = decoder(name)
    options = KEYS | keys | {"policy": COMBINED, "keep_ratio": 0.5}
    focus = sized(compiled(model, evict_alpha=alpha, **options, **OPTIONS))
    judge = oracle(
        model,
        block_length=B,
        alpha=alpha,
        threshold=2.0,
        model_first=True,
        max_length=64,
        **options,
    )
    compared = evicted = left_out = 0
    for seed in range(8):
        ids, calls = prompts_of(batch, seed, length=3 * B), []

        def see(ids: Tensor, logits: Tensor, calls: list[Any] = calls) -> None:
            calls.append((ids, logits))
            assert_finished_is_the_models(model, ids, logits)

        with focus_compile.record() as history:
            found = decode(focus, ids, 2, best(1), see)
        assert [record.program for record in history] == ["refresh"] + ["step"] * (2 * B - 1)
        for at, (prompt, whole) in enumerate(zip(ids.tolist(), found.tolist(), strict=True)):
            run = judge.generate(prompt, max_new_tokens=2 * B)
            if not run.clear:
                continue
            compared += 1
            assert whole[3 * B :] == run.tokens
            steps = [step for step in run.steps if not step.commits]
            for (given_ids, logits), step in zip(calls, steps, strict=True):
                evicted += len(step.listed) - len(step.kept)
                left_out += sum(map(len, step.left_out.values()))
                for position, expected in step.logits.items():
                    assert given_ids[at, position] == MASK
                    torch.testing.assert_close(logits[at, position], expected, rtol=1e-3, atol=1e-3)
        if compared >= 2:
            break
    assert compared
    assert left_out
    assert bool(evicted) == (alpha == 1.0)
    sparse, every = (history[-1].keys[name] for name in ("sparse-suffix", "dense-prefix"))
    assert every == 5 * B
    assert sparse == 3 * B if keys == {} else sparse < every


def logits_of_all_calls(model: nn.Module, ids: Tensor, **options: Any) -> list[Tensor]:
    found: list[Tensor] = []
    focus = compiled(model, evict_alpha=1.0, **options, **OPTIONS)
    decode(focus, ids, 1, best(2), lambda _, logits: found.append(logits))
    return found


def test_where_all_keys_are_read_it_is_focus_evict() -> None:
    """Bit by bit: by a share of 1, and where the finished blocks are shorter than a key block."""
    model, ids = decoder("qwen3", num_hidden_layers=2), prompts_of(2, 3)
    expected = logits_of_all_calls(model, ids, policy="focus-evict")
    for keys in ({"keep_ratio": 1.0, "key_block": 4}, {"keep_ratio": 0.0, "key_block": 2 * B + 1}):
        found = logits_of_all_calls(model, ids, policy=COMBINED, dense_layers=0, **keys)
        assert all(map(torch.equal, found, expected))
        assert len(found) == len(expected)


MODELS: tuple[dict[str, Any], ...] = (
    {"name": "qwen3", "cut": 1, "block_length": 8, "keys": KEYS},
    # Layers choose keys on both sides of the cut, and key blocks end where no decode block does.
    {"name": "llama", "cut": 2, "block_length": 4,
     "keys": {"key_block": 3, "sink_tokens": 0, "dense_layers": 0, "keep_ratio": 0.25}},
)  # fmt: skip


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Any]:
    return draw(st.sampled_from(MODELS)) | {
        "policy": COMBINED,
        "alpha": draw(st.sampled_from((1.5, 1.0, math.inf))),
        "threshold": draw(st.sampled_from((0.3, 0.6, 1.0))),
    }


@given(choice=choices(), prompt=prompts(), tokens=st.integers(1, 20))
@few
def test_one_sequence_step_by_step(choice: dict[str, Any], prompt: list[int], tokens: int) -> None:
    compare(choice, prompt, tokens)


@given(
    batch=st.lists(st.tuples(prompts(), st.integers(1, 20)), min_size=2, max_size=4),
    alpha=st.sampled_from((1.0, 1.5)),
    threshold=st.sampled_from((0.3, 0.6, 0.9)),
)
@few
def test_each_sequence_is_decoded_as_alone(
    batch: list[tuple[list[int], int]], **options: Any
) -> None:
    """Beside others that commit, that join, and that have left the slot it takes."""
    model = decoder("qwen3")
    options |= {"policy": COMBINED, "block_length": 8}
    alone = oracle(model, keep_ratio=0.5, **KEYS, **options)
    expected = [alone.generate(prompt, tokens) for prompt, tokens in batch]
    assume(all(run.clear for run in expected))
    made = generator(model, max_batch=2, key_options=KEYS, **options)
    watch = Watch(made)
    for prompt, tokens in batch:
        made.submit(prompt, tokens)
    for completion in made.results():
        wanted = expected[completion.request]
        assert list(completion.tokens) == wanted.tokens
        for found, step in zip(watch.steps[completion.request], wanted.steps, strict=True):
            same_step(found, step)


def test_a_generator_s_limits() -> None:
    """A share of 1 is focus-evict; an endless budget evicts nothing, whatever keys are read."""
    options: dict[str, Any] = {"block_length": 8, "max_batch": 2, "threshold": 0.6}
    dense = generator(decoder("qwen3"), **options)
    sparse = generator(decoder("qwen3"), policy=COMBINED, key_options=KEYS, **options)

    def run(made: Any, policy: str, alpha: float, keep_ratio: float) -> tuple[Any, Any]:
        made.policy, made.alpha, made.keep_ratio = policy, alpha, keep_ratio
        made.history.clear()
        done = generate(made, [[3, 1, 4, 1, 5] * 4, [2, 7] * 6, [8]], 20)
        return [one.tokens for one in done], [(step.listed, step.kept) for step in made.history]

    assert run(sparse, COMBINED, 1.0, 1.0) == run(dense, "focus-evict", 1.0, 0.5)
    delayed = run(dense, "delayed-cache", math.inf, 0.5)
    assert run(sparse, COMBINED, math.inf, 1.0) == delayed
    tokens, steps = run(sparse, COMBINED, math.inf, 0.25)
    assert tokens != delayed[0]
    assert all(listed == kept for listed, kept in steps)


def test_summaries_are_made_once_and_are_final() -> None:
    """Every full key block of finished blocks has its keys' bounds, those of the exact keys."""
    made = generator(
        decoder("qwen3"), block_length=8, max_batch=2, policy=COMBINED, key_options=KEYS
    )
    written: list[tuple[int, int]] = []
    summarise = made.programs.summarise

    def watched(caches: Any, finished: Iterable[tuple[int, int, int]]) -> None:
        done = list(finished)
        written.extend((slot, at) for slot, first, end in done for at in range(first, end))
        summarise(caches, done)

    made.programs.summarise = watched  # type: ignore[method-assign]
    for prompt in ([5] * 19, [7, 1, 4, 2]):
        made.submit(prompt, 20)
    while made.pending:
        made.step()
        layers = len(made.programs.plan.sites)
        for site, found in zip(made.programs.sparse, made.caches[2 * layers :], strict=True):
            for slot, begin in enumerate(made.state.begin.tolist()):
                keys = made.caches[2 * site.index][slot, :, :begin].unflatten(1, (-1, 4))
                bounds = torch.cat([keys.amax(2), keys.amin(2)], -1)
                assert torch.equal(found[slot, :, : begin // 4], bounds)
    assert len(written) == len(set(written))


@pytest.mark.parametrize(
    ("name", "value"), [("expansion", 2), ("window", 4), ("refresh", "every-step")]
)
def test_options_that_it_does_not_read_are_refused(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"{name}=.*focus-dllm\+evict"):
        FocusConfig(policy=COMBINED, **{name: value})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"commit": "delayed", "policy": COMBINED}, "commit='delayed'"),
        ({"key_options": {"keep": 0.5}, "policy": COMBINED}, "did you mean 'keep_ratio'"),
        ({"key_options": {"keep_ratio": 2}, "policy": COMBINED}, "keep_ratio=2"),
        ({"key_options": {"keep_ratio": 0.5}}, "key_options=.*focus-evict, which reads all keys"),
    ],
)
def test_a_generator_s_bad_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        generator(decoder("qwen3"), block_length=8, **options)


def test_the_plan_names_regions_and_the_cut(capsys: pytest.CaptureFixture[str]) -> None:
    model = decoder("qwen3")
    ids = torch.cat([prompts_of(1), torch.full((1, B), MASK)], 1)

    def whole(ids: Tensor) -> Tensor:
        return call(model, ids)

    found = focus_compile.explain(
        whole, ids, policy=COMBINED, mask_token_id=MASK, block_length=B, dense_if_faster=False
    )
    shown = capsys.readouterr().out
    assert [shown.count(region) for region in ("dense-prefix", "sparse-suffix")] == [1, 2]
    assert "some leave after the keys and values of layer 1" in shown
    [graph] = found.graphs
    assert graph.plan is not None
    assert graph.plan.to_dict()["regions"]["sparse-suffix"] == [1, 2]
