"""What a step may read and must keep: K/V that exist, rows that stay, keys that are seen."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from focus_compile.block_diffusion.state import DECODE, BlockState
from focus_compile.policies.focus_evict import Yield, last_true, ready
from tests.block_diffusion.test_against_oracle import compare, prompts
from tests.block_diffusion.tiny import (
    DENSE_POLICIES,
    MASK,
    Watch,
    decoder,
    generate,
    generator,
    oracle,
)

BLOCK = 8
few = settings(
    max_examples=7,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@given(
    batch=st.lists(prompts(), min_size=1, max_size=3),
    policy=st.sampled_from(DENSE_POLICIES[::-1]),
    commit=st.sampled_from(("exact", "delayed")),
    threshold=st.sampled_from((0.3, 0.6, 0.9)),
    alpha=st.sampled_from((1.0, 1.5)),
)
@few
def test_nothing_unwritten_is_read(batch: list[list[int]], **options: Any) -> None:
    """Caches are NaN until written; every position up to the rightmost has K/V at all layers."""
    made = generator(decoder("qwen3"), block_length=BLOCK, max_batch=2, **options)
    for cache in made.caches:
        cache.fill_(float("nan"))
    watch, state = Watch(made), made.state
    for prompt in batch:
        made.submit(prompt, 20)
    while made.pending:
        before = state.begin.clone(), state.progress.clone(), state.phase.clone()
        made.step()
        same = (before[0] == state.begin) & (before[2] == DECODE) & (state.phase == DECODE)
        assert (state.progress >= before[1])[same].all()
        for slot, (begin, last) in enumerate(zip(state.begin, state.progress, strict=True)):
            for cache in made.caches:
                assert not cache[slot, :, : int(begin + last) + 1].isnan().any()
    for steps in watch.steps.values():
        assert not any(one.isnan().any() for step in steps for one in step.logits.values())


@given(
    prompt=prompts(),
    threshold=st.sampled_from((0.3, 0.6, 0.9)),
    alpha=st.sampled_from((1.0, 1.5)),
)
@few
def test_rows_leave_only_while_they_are_masked(
    prompt: list[int], threshold: float, alpha: float
) -> None:
    options: dict[str, Any] = {"threshold": threshold, "alpha": alpha}
    made = generator(decoder("qwen3"), block_length=BLOCK, max_batch=1, **options)
    watch = Watch(made)
    generate(made, [prompt], 20)
    known = set(range(len(prompt)))
    for step in watch.steps[0]:
        assert set(step.kept) <= set(step.listed)
        assert set(step.listed) & known <= set(step.kept)
        assert set(step.decoded) <= set(step.kept) - known
        assert set(step.logits) == set(step.kept) - known
        assert step.decoded or not step.logits
        known |= set(step.decoded)


def test_rows_do_leave() -> None:
    made = generator(decoder("qwen3"), block_length=BLOCK, max_batch=1, threshold=0.6)
    generate(made, [[3, 1, 4, 1, 5]], 30)
    evicting = [step for step in made.history if step.evicting]
    assert sum(step.kept for step in evicting) < sum(step.listed for step in evicting)
    assert all(step.decoded > 0 for step in evicting)


CHOICE = {
    "name": "qwen3", "cut": 1, "block_length": BLOCK, "policy": "focus-evict", "alpha": 1.0,
    "threshold": 0.3, "commit": "exact",
}  # fmt: skip


def test_the_frozen_tail_of_a_block_is_seen() -> None:
    """A block whose last positions are final while earlier ones are masked, and all kept rows are
    in front of them: found among random prompts, and then computed as the oracle does."""
    options = {name: value for name, value in CHOICE.items() if name != "name"}
    random = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(60):
        prompt = torch.randint(MASK, (9,), generator=random).tolist()
        run = oracle(decoder("qwen3"), **options).generate(prompt, 20)
        hidden = [step for step in run.steps if step.visible > step.kept[-1] + 1]
        if hidden and run.clear:
            compare(CHOICE, prompt, 20)
            found += 1
        if found == 2:
            return
    pytest.fail("no such block among these prompts")


def block(tokens: list[int], uncached: list[int], begin: int = 16) -> BlockState:
    """A state of two slots, the second of which decodes this block."""
    state = BlockState.allocate(2, len(tokens), 64, MASK, torch.device("cpu"))
    state.start(1, torch.tensor(tokens), begin)
    state.uncached[1] = torch.tensor([at in uncached for at in range(len(tokens))])
    state.phase[1] = DECODE
    return state


def test_lengths_of_a_list_reach_the_frozen_tail() -> None:
    state = block([5, MASK, MASK, 7, 8, 9], uncached=[0, 1, 2])
    listing = state.listing(8, everything=False, commit_all=True)
    assert listing.index[listing.real].tolist() == [6, 7, 8]
    assert listing.rows.lengths.tolist() == [0, 22]
    keep = torch.tensor([True, True, *[False] * 6])
    narrow, chosen = state.narrowed(listing, keep, 8)
    assert chosen[0, :2].tolist() == [0, 1]
    assert narrow.rows.lengths.tolist() == [0, 22]


def test_lengths_end_with_the_last_kept_row_where_no_tail_is_frozen() -> None:
    state = block([5, MASK, MASK, 7, MASK, MASK], uncached=[1, 2, 3, 4, 5])
    listing = state.listing(8, everything=False, commit_all=True)
    assert listing.rows.lengths.tolist() == [0, 22]
    narrow, _ = state.narrowed(listing, torch.tensor([True, True, *[False] * 6]), 8)
    assert narrow.rows.lengths.tolist() == [0, 19]
    assert narrow.rows.starts.tolist() == [0, 0, 2]


@given(flags=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
@settings(deadline=None)
def test_ready_rows_and_last_rows(flags: list[list[bool]]) -> None:
    masked = torch.tensor(flags)
    for row, (final, last) in enumerate(
        zip(ready(masked).tolist(), last_true(masked).tolist(), strict=True)
    ):
        own = flags[row]
        assert final == [not own[i] and (i == 4 or not own[i + 1]) for i in range(5)]
        assert last == max((i for i in range(5) if own[i]), default=-1)


def test_the_mean_yield_counts_steps_that_decoded() -> None:
    decoded = Yield(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    assert decoded.mean().tolist() == [1, 1, 1]
    for counts in ([2, 0, 1], [3, 0, 0], [0, 0, 4]):
        decoded.add(torch.tensor(counts))
    assert decoded.mean().tolist() == [2.5, 1, 2.5]
    decoded.reset(torch.tensor([True, False, False]))
    assert decoded.mean().tolist() == [1, 1, 2.5]
    assert decoded.mean().dtype == torch.float64
