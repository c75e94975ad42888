"""torch.compile with the block policies: a loop over a prefix that grows by a block."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import DynamicCache, StaticCache

import focus_compile
from focus_compile.block_diffusion import dispatch
from focus_compile.errors import RefusalError
from focus_compile.fallback import FocusWarning, forget
from focus_compile.passes.block_causality import block_causal_mask
from focus_compile.runtime.store import STORE
from tests.block_diffusion.tiny import DECODERS, MASK, VOCAB, decoder, oracle
from tests.compiled import compiled

B = 8
OPTIONS: dict[str, Any] = {
    "mask_token_id": MASK,
    "block_length": B,
    "strict": True,
    "dynamic": None,
}
Choose = Callable[[Tensor, Tensor], Tensor]


def call(model: Any, ids: Tensor, dynamic: bool = True, **changed: Any) -> Tensor:
    """Logits [batch, tokens, vocabulary] of the cache-free form.

    dynamic: one graph serves all lengths, where torch would trace one for the first length before.
    """
    batch, length = ids.shape
    inputs = {
        "attention_mask": block_causal_mask(length, B, ids.device).expand(batch, -1, -1, -1),
        "position_ids": torch.arange(length, device=ids.device).expand(batch, -1),
    } | changed
    if dynamic and not torch.compiler.is_compiling():
        for tensor in (ids, *(value for value in inputs.values() if value is not None)):
            for axis in {1, 2, 3} & set(range(tensor.dim())):
                if tensor.shape[axis] == length:
                    torch._dynamo.maybe_mark_dynamic(tensor, axis)
    with torch.no_grad():
        logits: Tensor = model(ids, **inputs, use_cache=False).logits
    return logits


def at_least(threshold: float) -> Choose:
    def choose(confidence: Tensor, masked: Tensor) -> Tensor:
        best = torch.zeros_like(masked).scatter(1, confidence.argmax(1, keepdim=True), True)
        return (best | (confidence >= threshold)) & masked

    return choose


def best(count: int) -> Choose:
    def choose(confidence: Tensor, masked: Tensor) -> Tensor:
        top = confidence.topk(count, 1).indices
        return torch.zeros_like(masked).scatter(1, top, True) & masked

    return choose


def decode(
    model: Any,
    ids: Tensor,
    blocks: int,
    choose: Choose,
    see: Callable[..., None] | None = None,
    dynamic: bool = True,
) -> Tensor:
    """Append and decode blocks; `see` is given the ids and logits of every call."""
    for _ in range(blocks):
        ids = torch.cat([ids, torch.full((ids.shape[0], B), MASK).to(ids)], 1)
        while (masked := ids[:, -B:] == MASK).any():
            logits = call(model, ids, dynamic)
            if see is not None:
                see(ids, logits)
            last = logits[:, -B:].float().index_fill(-1, ids.new_tensor([MASK]), -torch.inf)
            confidence, token = last.softmax(-1).max(-1)
            chosen = choose(confidence.masked_fill(~masked, -1.0), masked)
            ids = torch.cat([ids[:, :-B], torch.where(chosen, token, ids[:, -B:])], 1)
    return ids


def prompts(batch: int, seed: int = 0, length: int = 2 * B) -> Tensor:
    return torch.randint(
        1, MASK, (batch, length), generator=torch.Generator().manual_seed(seed), device="cpu"
    )


@pytest.mark.parametrize(("name", "batch"), [*((name, 1) for name in DECODERS), ("qwen3", 3)])
def test_the_delayed_cache_decodes_as_the_oracle(name: str, batch: int) -> None:
    model = decoder(name)
    focus = compiled(model, policy="delayed-cache", **OPTIONS)
    judge = oracle(model, block_length=B, policy="delayed-cache", threshold=0.6, max_length=64)
    compared = 0
    for seed in range(8):  # until some choices are clear
        ids = prompts(batch, seed)
        with focus_compile.record() as history:
            found = decode(focus, ids, 3, at_least(0.6), dynamic=batch == 1)
        for prompt, whole in zip(ids.tolist(), found.tolist(), strict=True):
            run = judge.generate(prompt, max_new_tokens=3 * B)
            if run.clear:
                compared += 1
                assert whole[2 * B :] == run.tokens
        programs = [record.program for record in history]
        # Where torch is not told, a graph for one length, and one for all.
        assert programs.count("refresh") == (1 if batch == 1 else 2)
        assert programs.count("exact") == 0
        assert sum(record.rows for record in history) < batch * len(history) * 3 * B
        if compared:
            return
    raise AssertionError("no run was clear")


@pytest.mark.parametrize("policy", ["delayed-cache", "focus-evict", "block-diffusion"])
def test_rows_of_finished_blocks_are_those_of_the_model(policy: str) -> None:
    """Exactly committed, whatever was evicted; and more blocks than the caches first hold."""
    model = decoder("qwen3")
    focus = compiled(model, policy=policy, **OPTIONS)
    calls: list[tuple[bool, float]] = []

    def see(ids: Tensor, logits: Tensor) -> None:
        dense = call(model, ids)
        error = (logits - dense)[:, :-B].abs().amax()
        whole = bool((ids[:, -B:] == MASK).all())
        calls.append((whole, float(error / dense.abs().amax())))

    decode(focus, prompts(2), dispatch.SPARE_BLOCKS + 4, best(3), see)
    assert max(error for _, error in calls) < 1e-4


def test_whole_blocks_are_exact() -> None:
    model = decoder("llama")
    focus = compiled(model, policy="block-diffusion", **OPTIONS)

    def see(ids: Tensor, logits: Tensor) -> None:
        torch.testing.assert_close(logits, call(model, ids), rtol=1e-3, atol=1e-3)

    with focus_compile.record() as history:
        decode(focus, prompts(2, seed=1), 3, best(3), see)
    assert [record.program for record in history].count("step") >= 6


@pytest.mark.parametrize("cache", ["default", "dynamic", "static"])
def test_a_model_with_its_own_cache_is_told_how_to_be_called(cache: str) -> None:
    model = decoder("qwen3")
    ids = torch.cat([prompts(1), torch.full((1, B), MASK)], 1)
    mask, named = block_causal_mask(ids.shape[1], B), {}
    if cache == "dynamic":
        named["past_key_values"] = DynamicCache(config=model.config)
    if cache == "static":
        named["past_key_values"] = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    focus = compiled(model, policy="focus-evict", **OPTIONS)
    with pytest.raises(BackendCompilerFailed, match="use_cache=False"), torch.no_grad():
        focus(ids, attention_mask=mask, **named)


def test_an_evicted_row_keeps_its_token_and_loses_its_confidence() -> None:
    model = decoder("qwen3")
    focus = compiled(model, policy="focus-evict", **OPTIONS)
    seen: list[tuple[Tensor, Tensor]] = []
    with focus_compile.record() as history:
        decode(focus, prompts(1), 2, at_least(0.95), lambda *given: seen.append(given))
    evicting = [
        (before, now, record)
        for (before, now, record) in zip(seen, seen[1:], history[1:], strict=False)
        if record.kept is not None and record.kept < record.rows
    ]
    assert evicting
    for (before_ids, before), (ids, logits), _ in evicting:
        if ids.shape != before_ids.shape:
            continue
        highest = logits[0, -B:].float().softmax(-1).amax(-1)
        faint = (ids[0, -B:] == MASK) & (highest < 1.1 / VOCAB)
        if faint.any():
            now, then = logits[0, -B:][faint], before[0, -B:][faint]
            assert torch.equal(now.argmax(-1), then.argmax(-1))
            break
    else:
        raise AssertionError("no row was ever evicted")


def test_everything_kept_is_the_delayed_cache() -> None:
    model, ids = decoder("llama"), prompts(2, seed=3)
    every = decode(
        compiled(model, policy="focus-evict", evict_alpha=1e9, **OPTIONS), ids, 3, at_least(0.7)
    )
    delayed = decode(compiled(model, policy="delayed-cache", **OPTIONS), ids, 3, at_least(0.7))
    assert torch.equal(every, delayed)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_loop_with_a_fixed_number_a_call_finds_its_rows_computed(count: int) -> None:
    forget()
    model = decoder("qwen3")
    focus = compiled(model, policy="focus-evict", **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FocusWarning)
        with focus_compile.record() as history:
            decode(focus, prompts(2, seed=5), 3, best(count))
    assert any(record.kept is not None and record.kept < record.rows for record in history)


def test_a_caller_that_decodes_evicted_rows_is_told_and_eviction_ends() -> None:
    forget()
    focus = compiled(decoder("qwen3"), policy="focus-evict", **OPTIONS)
    calls = iter(range(100))

    def choose(confidence: Tensor, masked: Tensor) -> Tensor:
        """After two calls, the row that the model is least sure of."""
        if next(calls) >= 2:
            confidence = torch.where(masked, 1 - confidence, -1.0)
        return best(1)(confidence, masked)

    with pytest.warns(FocusWarning, match="evict_alpha"):
        decode(focus, prompts(1), 2, choose)


def test_other_text_begins_anew() -> None:
    model = decoder("qwen3")
    focus = compiled(model, policy="delayed-cache", **OPTIONS)
    ids = torch.cat([prompts(1), torch.full((1, B), MASK)], 1)
    other = ids.clone()
    other[0, 3] = ids[0, 3] % (MASK - 1) + 1
    with focus_compile.record() as history:
        for given, changed in (
            (ids, {}),
            (ids, {}),
            (other, {}),
            (other, {"position_ids": torch.arange(3, 3 + ids.shape[1])[None]}),
            (other[:, B:], {}),
        ):
            logits = call(focus, given, **changed)
            torch.testing.assert_close(logits, call(model, given, **changed), rtol=1e-3, atol=1e-3)
    programs = [record.program for record in history]
    assert programs[:4] == ["refresh", "step", "refresh", "refresh"]
    assert "inputs" in history[3].why or "input" in history[3].why


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ids: ids[:, :-3], "multiple of block_length=8"),
        (lambda ids: ids.index_fill(1, torch.tensor([2]), MASK), "masks before the last block"),
    ],
)
def test_ids_that_are_no_prefix_of_blocks(change: Callable[[Tensor], Tensor], reason: str) -> None:
    model = decoder("qwen3")
    ids = change(torch.cat([prompts(1), torch.full((1, B), MASK)], 1))
    with pytest.raises(RefusalError, match=reason):
        call(compiled(model, policy="delayed-cache", **OPTIONS), ids)
    with pytest.warns(FocusWarning, match=reason):
        logits = call(compiled(model, policy="delayed-cache", **OPTIONS | {"strict": False}), ids)
    torch.testing.assert_close(logits, call(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (block_causal_mask(3 * B, B // 2), "blocks of 4, not with blocks of 8"),
        (torch.ones(1, 1, 3 * B, 3 * B, dtype=torch.bool), "blocks of 24"),
        (torch.ones(1, 1, 3 * B, 3 * B, dtype=torch.bool).triu(), "not block-causal"),
    ],
)
def test_masks_that_are_not_block_causal(mask: Tensor, reason: str) -> None:
    model = decoder("qwen3")
    ids = torch.cat([prompts(1), torch.full((1, B), MASK)], 1)
    with pytest.raises(RefusalError, match=reason):
        call(compiled(model, policy="focus-evict", **OPTIONS), ids, attention_mask=mask)


def test_a_causal_model_without_a_mask_is_told_how_to_be_called() -> None:
    model = decoder("qwen3")
    ids = torch.cat([prompts(1), torch.full((1, B), MASK)], 1)
    with pytest.raises(BackendCompilerFailed, match="block-causal 4D attention mask"):
        call(compiled(model, policy="focus-evict", **OPTIONS), ids, attention_mask=None)


@pytest.mark.parametrize("policy", ["delayed-cache", "focus-evict", "focus-dllm+evict"])
def test_edited_and_finished_blocks_are_computed_whole(policy: str) -> None:
    """Tokens of the last block taken back or replaced, then a call without masks, then one block
    more: each is exact, and none computes the prefix again."""
    model = decoder("qwen3")
    combined = {"key_block": 4, "keep_ratio": 0.1, "dense_layers": 0, "sink_tokens": 4}
    sparse = combined if policy == "focus-dllm+evict" else {}
    focus = compiled(model, policy=policy, **OPTIONS, **sparse)
    decode(focus, prompts(2, seed=9, length=B), 2, best(4))  # from now on, one graph of any length
    text = torch.cat([prompts(2, seed=7), prompts(2, seed=8, length=2 * B)], 1)
    ids = text[:, : 3 * B].clone()
    ids[:, -B:] = MASK
    call(focus, ids)
    some = ids.clone()
    some[:, -B:-2] = text[:, 2 * B : 3 * B - 2]
    call(focus, some)
    back, other = some.clone(), some.clone()
    back[0, -B], back[1, -B + 3] = MASK, MASK
    other[:, -B + 1] = other[:, -B + 1] % (MASK - 1) + 1
    done = torch.where(other == MASK, text[:, : 3 * B], other)
    edited = torch.cat([done, torch.full((2, B), MASK)], 1)
    edited[0, -B - 1] = edited[0, -B - 1] % (MASK - 1) + 1
    with focus_compile.record() as history:
        for given in (back, other, done, edited):
            logits, dense = call(focus, given), call(model, given)
            known = slice(0, 3 * B)  # the new block has but few of its rows
            torch.testing.assert_close(logits[:, known], dense[:, known], rtol=1e-3, atol=1e-3)
    assert [record.program for record in history] == ["step"] * 4
    assert [record.why for record in history] == [
        "decided tokens changed", "decided tokens changed", "the block is finished",
        "the next block",
    ]  # fmt: skip
    assert all(record.rows == 2 * B for record in history)


def test_a_repeated_call_gets_what_was_computed() -> None:
    model = decoder("qwen3")
    focus = compiled(model, policy="focus-evict", **OPTIONS)
    ids = torch.cat([prompts(1), torch.full((1, B), MASK)], 1)
    first = call(focus, ids)
    with focus_compile.record() as history:
        assert torch.equal(call(focus, ids), first)
    assert [(record.program, record.rows) for record in history] == [("step", 0)]


def test_scoring_other_texts_gives_up_on_caches() -> None:
    """And a loop finds them again."""
    forget()
    model = decoder("qwen3")
    focus = compiled(model, policy="delayed-cache", **OPTIONS | {"strict": False})
    with focus_compile.record() as history, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", FocusWarning)
        for seed in range(7):
            ids = torch.cat([prompts(1, seed), torch.full((1, B), MASK)], 1)
            torch.testing.assert_close(call(focus, ids), call(model, ids), rtol=1e-3, atol=1e-3)
    assert [record.program for record in history] == ["refresh"] * 4 + ["exact"] * 3
    (line,) = [str(w.message) for w in said if w.category is FocusWarning]
    assert "were not continued" in line
    assert STORE.nbytes == 0
    with focus_compile.record() as history:
        found = decode(focus, prompts(1), 2, best(2))
    programs = [record.program for record in history]
    assert programs[:4] == ["exact", "refresh", "step", "step"]
    assert "exact" not in programs[1:]
    again = compiled(model, policy="delayed-cache", **OPTIONS)
    assert torch.equal(found, decode(again, prompts(1), 2, best(2)))


def test_nothing_masked_runs_exactly() -> None:
    model = decoder("qwen3")
    focus = compiled(model, policy="focus-evict", **OPTIONS)
    ids = prompts(1)
    with focus_compile.record() as history:
        logits = call(focus, ids)
    assert [record.program for record in history] == ["exact"]
    torch.testing.assert_close(logits, call(model, ids))


def test_only_the_response_s_logits() -> None:
    model: nn.Module = decoder("llama")
    ids = torch.cat([prompts(1), torch.full((1, B), MASK)], 1)
    focus = compiled(model, policy="delayed-cache", logits="response", **OPTIONS)
    for _ in range(2):
        logits = call(focus, ids)
        assert not logits[:, :-B].any()
        torch.testing.assert_close(logits[:, -B:], call(model, ids)[:, -B:], rtol=1e-3, atol=1e-3)


def test_compiled_by_inductor() -> None:
    """Two lengths compile, the rest reuse: automatic dynamic shapes."""
    model, ids = decoder("qwen3", num_hidden_layers=2), prompts(1, seed=2)
    options = OPTIONS | {"lowering": "inductor"}
    found = decode(compiled(model, policy="delayed-cache", **options), ids, 2, best(4))
    eager = decode(compiled(model, policy="delayed-cache", **OPTIONS), ids, 2, best(4))
    assert torch.equal(found, eager)


def test_it_can_be_warmed_up_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    model = decoder("llama")
    ids = torch.cat([prompts(1), torch.full((1, B), MASK)], 1)
    focus = compiled(model, policy="focus-evict", **OPTIONS)
    named = {"attention_mask": block_causal_mask(ids.shape[1], B), "use_cache": False}
    [prepared] = focus_compile.warmup(focus, ids, **named)
    assert prepared.buckets == (B,)
    with focus_compile.record() as history, torch.no_grad():
        logits = focus(ids, **named).logits
    assert history[0].program == "refresh"
    torch.testing.assert_close(logits, call(model, ids), rtol=1e-3, atol=1e-3)
    options = {"policy": "focus-evict", "mask_token_id": MASK, "block_length": B}

    def whole(ids: Tensor) -> Tensor:
        return call(model, ids)

    focus_compile.explain(whole, ids, **options)
    assert "some leave after the keys and values of layer 1" in capsys.readouterr().out
