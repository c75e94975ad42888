"""Which prompt rows a block entry renews: budget, age bound, and an unbiased draw."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.policies.adaptive_refresh import FEWEST_DRAWN, likely_read, rows_to_renew

quick = settings(max_examples=100, deadline=None, derandomize=True)


@st.composite
def prompts(draw: st.DrawFn) -> Tensor:
    """bool [batch, length]: the first positions of each sequence, any number of them."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 80))
    ends = draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    return torch.arange(length) < torch.tensor(ends)[:, None]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@quick
@given(prompts(), st.floats(0, 1), st.integers(1, 40), st.integers(0, 2**16))
def test_no_row_is_left_out_for_longer_than_its_age_may_be(
    prompt: Tensor, share: float, max_age: int, seed: int
) -> None:
    age = torch.zeros(prompt.shape, dtype=torch.int64)
    attention = torch.rand(prompt.shape, generator=generator(seed))
    for entry in range(2 * max_age + 2):
        renewal = rows_to_renew(attention, age, prompt, share, max_age, 64, generator(entry))
        assert not (renewal.rows & ~prompt).any()
        age = (age + 1).masked_fill(renewal.rows, 0)
        assert int(age[prompt].max() if prompt.any() else 0) < max_age


@quick
@given(prompts(), st.floats(0, 1), st.integers(1, 40), st.integers(0, 64), st.integers(0, 2**16))
def test_the_budget_is_kept_but_for_age_and_the_fewest_drawn(
    prompt: Tensor, share: float, max_age: int, most_drawn: int, seed: int
) -> None:
    attention = torch.rand(prompt.shape, generator=generator(seed))
    age = torch.zeros(prompt.shape, dtype=torch.int64)
    renewal = rows_to_renew(attention, age, prompt, share, max_age, most_drawn, generator(seed))
    total = prompt.sum(1)
    oldest = (total + max_age - 1) // max_age
    budget = (total.double() * share).ceil().long()
    assert (
        renewal.rows.sum(1) <= torch.maximum(budget, oldest + min(FEWEST_DRAWN, most_drawn))
    ).all()
    drawn = renewal.weight > 0
    assert (drawn.sum(1) <= most_drawn).all()
    assert not (drawn & ~renewal.rows).any()
    assert (renewal.weight[drawn] >= 1).all()


def test_what_is_read_most_is_renewed() -> None:
    prompt = torch.arange(400)[None] < 380
    attention = torch.rand(1, 400, generator=generator())
    attention[0, [5, 77, 200, 390]] += 10
    age = torch.zeros(1, 400, dtype=torch.int64)
    renewal = rows_to_renew(attention, age, prompt, 0.1, 100, 16, generator())
    assert renewal.rows[0, [5, 77, 200]].all()
    assert not renewal.rows[0, 390]


def test_the_draw_is_unbiased() -> None:
    """The weights of what is drawn add up to the rows that it was drawn from, on average, and so
    does anything else that rows have."""
    prompt = torch.ones(1, 300, dtype=torch.bool)
    attention = torch.rand(1, 300, generator=generator()) ** 3 + 0.01
    age = torch.zeros(1, 300, dtype=torch.int64)
    age[0, :3] = 9  # the oldest, and no row read most: the others are drawn from
    numbers = torch.rand(300, generator=generator(1), dtype=torch.float64)
    estimates = []
    for seed in range(400):
        renewal = rows_to_renew(attention, age, prompt, 0.05, 100, 16, generator(seed))
        estimates.append(float((renewal.weight[0].double() * numbers * attention[0]).sum()))
    expected = float((numbers * attention[0])[3:].sum())
    spread = torch.tensor(estimates).std() / 400**0.5
    assert abs(sum(estimates) / 400 - expected) < 4 * spread


def test_before_anything_was_measured_the_ends_of_the_prompt_count() -> None:
    prompt = torch.arange(20)[None] < 15
    order = likely_read(prompt, torch.tensor([15]), 2)[0].argsort(descending=True, stable=True)
    assert order[prompt[0][order]][:4].tolist() == [0, 1, 14, 13]
