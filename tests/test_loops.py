"""Published decoding loops, unmodified: with everything computed the tokens are dense's, and else
those of the policy; and what callers that do not decode may expect."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile.backend import focus
from focus_compile.fallback import FocusWarning, forget
from focus_compile.runtime.continuity import PATIENCE
from focus_compile.runtime.dispatch import EDITED
from focus_compile.runtime.store import STORE
from tests.compiled import run_call, shared_graphs
from tests.loops import LOOPS, Forward, fast_dllm, llada, score
from tests.models import build, logits_of
from tests.oracle import Oracle
from tests.runtime.tiny import (
    MASK,
    OPTIONS,
    SPEC,
    assert_own,
    decided,
    own_logits,
    prompt,
    shared,
    tiny_model,
)

EVERYTHING: dict[str, Any] = {"window": 4096, "keep_ratio": 1.0}
CLEAR_MARGIN = 1e-3


@pytest.fixture(autouse=True, scope="module")
def graphs_of_the_file() -> Iterator[None]:
    with shared_graphs(recompile_limit=256):
        yield


@pytest.fixture(autouse=True)
def no_state() -> Iterator[None]:
    yield
    focus.reset()  # type: ignore[attr-defined]


def forward_of(model: Any) -> Forward:
    @torch.no_grad()
    def forward(ids: Tensor) -> Tensor:
        return logits_of(model(ids))

    return forward


class ByTheOracle:
    """`forward` as the policy defines it, and how clear its choices were."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.oracle = Oracle(model, **options)
        self.programs: list[str] = []
        self.margin = torch.inf

    def __call__(self, ids: Tensor) -> Tensor:
        result = self.oracle.call(ids)
        self.programs.append(result.program)
        self.margin = min(self.margin, result.margin)
        return result.logits


def prompts(batch: int = 2, seed: int = 0) -> Tensor:
    return prompt(masks=0, length=8, batch=batch, seed=seed)


def run(loop: Callable[..., Tensor], forward: Forward, given: Tensor) -> Tensor:
    torch.manual_seed(3)
    return loop(forward, given, MASK)


@pytest.mark.parametrize("name", LOOPS)
def test_with_everything_computed_tokens_are_denses(name: str) -> None:
    model = tiny_model()
    with focus_compile.record() as history:
        found = run(LOOPS[name], forward_of(shared(model, **EVERYTHING)), prompts())
    assert torch.equal(found, run(LOOPS[name], forward_of(model), prompts()))
    programs = [entry.program for entry in history]
    assert programs[0] == "refresh"
    assert programs.count("step") >= len(programs) // 4
    assert "exact" not in programs
    edited = sum(entry.why == EDITED for entry in history)
    assert (edited > 0) == (name in ("remasking", "editing"))


@pytest.mark.parametrize("policy", ["focus-dllm", "dual-cache"])
@pytest.mark.parametrize("name", LOOPS)
def test_approximations_are_the_policys(name: str, policy: str) -> None:
    """Call by call, whatever the loop reads and decides."""
    model = build(replace(SPEC, position="learned"))  # else masks alone are all alike
    followed = forward_of(shared(model, policy=policy))
    for seed in range(8):
        expected = ByTheOracle(model, **OPTIONS, policy=policy)
        STORE.clear()

        def both(ids: Tensor, expected: ByTheOracle = expected) -> Tensor:
            logits, ours = expected(ids), followed(ids)
            if expected.margin > CLEAR_MARGIN:
                torch.testing.assert_close(ours, logits, rtol=1e-3, atol=1e-3)
            return logits

        with focus_compile.record() as history:
            run(LOOPS[name], both, prompts(seed=seed))
        if expected.margin > CLEAR_MARGIN:
            assert [entry.program for entry in history] == expected.programs
            assert "step" in expected.programs
            return
    raise AssertionError("every run had a tie")


def test_the_unconditional_half_decodes_in_the_blocks_of_the_other() -> None:
    """Its masked prompt is no block of its response, on whichever side of the batch it is."""
    ids = torch.cat([prompt(masks=8, length=16, batch=2)] * 2)
    for half in (slice(0, 2), slice(2, 4)):
        doubled = ids.clone()
        doubled[half] = MASK
        model = shared(tiny_model(), policy="dual-cache")
        with focus_compile.record() as history, torch.no_grad():
            model(doubled)
            doubled[:, 9] = 1
            model(doubled)
        assert [(entry.program, entry.rows) for entry in history][1] == ("step", 4 * 4)


def test_a_prompt_that_only_looks_unconditional_loses_no_logits() -> None:
    """A sequence that is all masks, beside one with a prompt: its first positions are decoded
    after all."""
    model = tiny_model()
    ids = torch.cat([prompt(masks=8, length=16), torch.full((1, 16), MASK)])
    focused = shared(model, policy="dual-cache", logits="response")
    assert_own(run_call(focused, ids)[0], model, ids)
    ids[:, 8], ids[1, 0] = 1, 1
    logits, record = run_call(focused, ids)
    assert record.program == "refresh"
    assert "before the response" in record.why
    assert_own(logits, model, ids)
    ids[1, 1] = 1
    assert run_call(focused, ids)[1].rows == 8


def calls_of(loop: Callable[..., Tensor], model: Any, given: Tensor) -> list[Tensor]:
    """The ids of every call that a loop makes."""
    calls: list[Tensor] = []
    forward = forward_of(model)

    def noting(ids: Tensor) -> Tensor:
        calls.append(ids.clone())
        return forward(ids)

    run(loop, noting, given)
    return calls


def test_guidance_in_two_calls_and_interleaved_prompts_never_mix() -> None:
    """They restart one another and then run exactly: every answer is dense's."""
    model = tiny_model()

    def guided(*given: Any) -> Tensor:
        return llada(*given, guidance=1.5, apart=True)

    two = zip(*(calls_of(llada, model, prompts(seed=seed)) for seed in range(2)), strict=True)
    for calls in (calls_of(guided, model, prompts()), [ids for pair in two for ids in pair]):
        STORE.clear()
        programs = []
        for ids in calls:
            logits, record = run_call(shared(model), ids)
            assert_own(logits, model, ids)
            programs.append(record.program)
        assert programs == ["refresh"] * PATIENCE + ["exact"] * (16 - PATIENCE)


def test_the_same_prompt_again_is_no_interleaved_call() -> None:
    """Its ids equal those that the first time ended with, once they are as far."""
    focused, calls = shared(tiny_model()), calls_of(llada, tiny_model(), prompts())
    first, again = ([run_call(focused, ids)[1] for ids in calls] for _ in range(2))
    assert [record.program for record in again] == [record.program for record in first]


def test_two_models_interleaved_keep_their_trajectories() -> None:
    models = [tiny_model(seed) for seed in range(2)]
    oracles = [Oracle(model, **OPTIONS) for model in models]
    for calls in zip(*(calls_of(llada, model, prompts()) for model in models), strict=True):
        for model, judge, ids in zip(models, oracles, calls, strict=True):
            expected = judge.call(ids)
            logits, record = run_call(shared(model), ids)
            assert record.program == expected.program
            if expected.margin > CLEAR_MARGIN:
                torch.testing.assert_close(logits, expected.logits, rtol=1e-3, atol=1e-3)


# Callers that do not decode


@pytest.mark.parametrize("length", [1, 6])
def test_scoring_under_random_masks_is_exact_and_soon_free(length: int) -> None:
    """One token has but one mask, so that calls repeat: they get the refresh's own logits."""
    model, given = tiny_model(), prompt(masks=0)
    question, answer = given[0, : 12 - length], given[0, 12 - length :]

    def likelihood(model: Any) -> float:
        torch.manual_seed(0)
        return score(forward_of(model), question, answer, MASK, draws=24)

    focused = shared(model)
    with focus_compile.record() as history:
        assert likelihood(focused) == pytest.approx(likelihood(model), rel=1e-4)
    rows = [entry.rows for entry in history if entry.program == "step"]
    assert not any(rows)
    if length > 1:
        refreshes = [entry for entry in history if entry.program == "refresh"]
        assert PATIENCE <= len(refreshes) <= PATIENCE + 2, "chance may look like a trajectory"
        assert history[-1].program == "exact"
        assert "were not continued" in history[-1].why
        assert STORE.nbytes == 0


def test_it_is_said_once_and_explained() -> None:
    forget()
    model = tiny_model()
    focused: Any = shared(model)
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        for seed in range(8):
            focused(prompt(seed=seed))
    (line,) = [str(w.message) for w in said if w.category is FocusWarning]
    assert line.startswith("focus_compile runs the exact program: the last 4 calls")
    found = focus_compile.explain(focused, prompt(), quiet=True, **OPTIONS)
    assert found.to_dict()["graphs"][0]["calls_never_continued"]
    assert "calls run exactly for now: the last 4 calls" in str(found)
    other = focus_compile.explain(tiny_model(), prompt(), quiet=True, **OPTIONS)
    assert not other.to_dict()["graphs"][0]["calls_never_continued"]


def test_strict_raises_instead() -> None:
    focused = shared(tiny_model(), strict=True)
    for seed in range(PATIENCE):
        run_call(focused, prompt(seed=seed))
    with pytest.raises(focus_compile.RefusalError, match="were not continued"):
        run_call(focused, prompt(seed=9))
    assert STORE.nbytes == 0


def test_a_loop_after_scoring_finds_its_caches_again() -> None:
    """From its second call on, in the blocks that its first call had."""
    model = tiny_model()
    focused = shared(model, policy="dual-cache")
    for seed in range(PATIENCE + 2):
        run_call(focused, prompt(seed=seed, masks=8))
    calls = calls_of(llada, model, prompts(batch=1, seed=20))
    records = [run_call(focused, ids)[1] for ids in calls]
    programs = [record.program for record in records]
    assert programs == ["exact", "refresh", "step", "step", "refresh", "step", "step", "step"]
    assert [record.rows for record in records][2:4] == [4, 4]
    again = calls_of(llada, model, prompts(batch=1, seed=21))
    assert [run_call(focused, ids)[1].program for ids in again][:2] == ["refresh", "step"]


# Batches


def padded_prompts() -> tuple[list[Tensor], Tensor, Tensor]:
    """Prompts of 3, 8 and 5 tokens; ids and mask of the same, padded on the left."""
    lengths = (3, 8, 5)
    alone = [prompt(masks=0, length=length, seed=length) for length in lengths]
    ids, keep = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64)
    for row, given in enumerate(alone):
        ids[row, 8 - given.shape[1] :], keep[row, 8 - given.shape[1] :] = given[0], 1
    return alone, ids, keep


@pytest.mark.parametrize("loop", [llada, fast_dllm])
def test_left_padded_prompts_decode_as_each_alone(loop: Callable[..., Tensor]) -> None:
    """Sequences that finish early and stand in different blocks, with everything computed."""
    model = build(replace(SPEC, padding=True, position="rope_half"))
    alone, ids, keep = padded_prompts()
    whole = torch.nn.functional.pad(keep, (0, 8), value=1)
    focused = shared(model, **EVERYTHING)

    @torch.no_grad()
    def padded(ids: Tensor) -> Tensor:
        return logits_of(focused(ids, attention_mask=whole))

    with focus_compile.record() as history:
        found = run(loop, padded, ids)
    assert "step" in [entry.program for entry in history]
    for row, given in enumerate(alone):
        expected = run(loop, forward_of(model), given)
        assert torch.equal(found[row, 8:], expected[0, given.shape[1] :])


def test_right_padded_responses_decode_as_each_alone() -> None:
    """Each response follows its prompt, and padding follows the response: the blocks of the
    sequences lie at different places."""
    model = build(replace(SPEC, padding=True, position="rope_half"))
    alone, _, _ = padded_prompts()
    ids = torch.zeros(3, 16, dtype=torch.int64)
    for row, given in enumerate(alone):
        end = given.shape[1] + 8
        ids[row, : end - 8], ids[row, end - 8 : end] = given[0], MASK
    keep = (ids != 0).long()
    focused, programs = shared(model, **EVERYTHING), []
    single = [torch.nn.functional.pad(given, (0, 8), value=MASK) for given in alone]
    while (ids == MASK).any():
        logits, record = run_call(focused, ids, attention_mask=keep)
        programs.append(record.program)
        for row, one in enumerate(single):
            if not (one == MASK).any():
                continue  # nothing of a finished sequence is computed again
            torch.testing.assert_close(
                logits[row, : one.shape[1]], own_logits(model, one)[0], rtol=1e-3, atol=1e-3
            )
            left = (one[0] == MASK).nonzero()[: row + 1, 0]  # each at a pace of its own
            one[0, left] = ids[row, left] = 1 + row
    assert programs.count("step") >= 3


@pytest.mark.parametrize("policy", ["focus-dllm", "dual-cache", "prefix-cache"])
def test_sequences_in_step_are_computed_as_each_alone(policy: str) -> None:
    """Approximately, but the same approximation: choices of one sequence are none of another's."""
    model = tiny_model()
    calls = calls_of(llada, model, prompts(batch=3))
    together = [run_call(shared(model, policy=policy), ids) for ids in calls]
    for row in range(3):
        STORE.clear()
        for ids, (logits, record) in zip(calls, together, strict=True):
            alone, own = run_call(shared(model, policy=policy), ids[row : row + 1])
            assert own.program == record.program
            torch.testing.assert_close(alone[0], logits[row], rtol=1e-3, atol=1e-3)


def test_equal_sequences_have_equal_logits() -> None:
    model = tiny_model()
    ids = prompts(batch=1).repeat(4, 1)
    for given in calls_of(llada, model, ids):
        logits = run_call(shared(model), given)[0]
        torch.testing.assert_close(logits, logits[:1].expand_as(logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 5, 7, 8])
def test_blocks_at_the_edges_of_buckets(block: int) -> None:
    """One row fewer, as many, and one more than a bucket holds."""
    model, ids = tiny_model(), prompt(masks=10, length=14, batch=2)
    options = {"policy": "dual-cache", "block_length": block, "buckets": (2, 4, 7)}
    focused, judge = shared(model, **options), Oracle(model, **OPTIONS | options)
    for _ in range(6):
        expected = judge.call(ids)
        logits, record = run_call(focused, ids)
        assert record.program == expected.program
        torch.testing.assert_close(logits, expected.logits, rtol=1e-3, atol=1e-3)
        if record.program == "step":
            assert record.bucket is not None
            assert record.bucket == next(b for b in (2, 4, 7, 14) if b >= block)
        ids = decided(ids)
