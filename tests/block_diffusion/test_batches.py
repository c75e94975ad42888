"""Sequences that decode side by side do not know of one another."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings

from tests.block_diffusion.test_against_oracle import prompts, same_step
from tests.block_diffusion.tiny import (
    DENSE_POLICIES,
    Watch,
    decoder,
    generate,
    generator,
    oracle,
)

BLOCK = 8
PROMPTS = [[3, 1, 4, 1, 5], [9] * 16, [2, 7, 1, 8] * 5 + [2], [8, 2]]


@given(
    batch=st.lists(st.tuples(prompts(), st.integers(1, 20)), min_size=2, max_size=5),
    max_batch=st.integers(1, 3),
    policy=st.sampled_from(DENSE_POLICIES),
    alpha=st.sampled_from((1.0, 1.5, 8.0)),
    threshold=st.sampled_from((0.3, 0.6, 0.9)),
    commit=st.sampled_from(("exact", "delayed")),
    late=st.integers(0, 4),
)
@settings(
    max_examples=7,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_each_sequence_is_decoded_as_alone(
    batch: list[tuple[list[int], int]], max_batch: int, late: int, **options: Any
) -> None:
    """Some join at once, some when there is room, some are only submitted after `late` steps."""
    model = decoder("qwen3")
    alone = oracle(model, block_length=BLOCK, **options)
    expected = [alone.generate(prompt, tokens) for prompt, tokens in batch]
    assume(all(run.clear for run in expected))
    made = generator(model, block_length=BLOCK, max_batch=max_batch, **options)
    watch, half = Watch(made), len(batch) // 2
    for prompt, tokens in batch[:half]:
        made.submit(prompt, tokens)
    done = [completion for _ in range(late) for completion in made.step()]
    for prompt, tokens in batch[half:]:
        made.submit(prompt, tokens)
    done += list(made.results())
    assert sorted(completion.request for completion in done) == list(range(len(batch)))
    for completion in done:
        wanted = expected[completion.request]
        assert list(completion.tokens) == wanted.tokens
        assert completion.steps == len(wanted.steps)
        for found, step in zip(watch.steps[completion.request], wanted.steps, strict=True):
            same_step(found, step)
    assert sum(step.sequences for step in made.history) == sum(len(r.steps) for r in expected)
    assert max(step.sequences for step in made.history) <= max_batch
    assert sum(s.listed for s in made.history) == sum(
        len(s.listed) for r in expected for s in r.steps
    )
    assert sum(s.kept for s in made.history) == sum(len(s.kept) for r in expected for s in r.steps)


def test_a_generator_starts_anew_when_it_was_empty() -> None:
    made = generator(decoder("qwen3"), block_length=BLOCK, max_batch=2, threshold=0.5)
    first = generate(made, PROMPTS, 12)
    again = generate(made, PROMPTS[::-1], 12)
    assert [c.tokens for c in again] == [c.tokens for c in first[::-1]]
    assert [c.request for c in again] == [4, 5, 6, 7]


def test_a_step_with_nothing_does_nothing() -> None:
    made = generator(decoder("qwen3"), block_length=BLOCK)
    assert made.step() == []
    assert list(made.results()) == []
    assert (made.pending, made.history) == (0, [])
    generate(made, [[1, 2]], 3)
    steps = len(made.history)
    assert made.step() == []
    assert len(made.history) == steps


def test_pending_counts_what_waits_and_what_decodes() -> None:
    made = generator(
        decoder("qwen3"), block_length=BLOCK, max_batch=2, threshold=0.0, policy="delayed-cache"
    )
    for prompt in PROMPTS:
        made.submit(prompt, 3)
    assert made.pending == 4
    finished = made.step()
    assert [c.request for c in finished] == [0, 1]
    assert made.pending == 2
    assert [c.request for c in made.step()] == [2, 3]
    assert made.pending == 0


@pytest.mark.long
@pytest.mark.slow
def test_compiled_programs_serve_all_row_counts() -> None:
    """Inductor gives what the graphs give op by op, also where a list holds one sequence at first
    and several later; after a warm-up nothing is compiled again for other row counts."""
    model = decoder("qwen2", num_hidden_layers=2)
    options: dict[str, Any] = {"block_length": 4, "threshold": 0.4, "max_length": 32}
    plain = generate(generator(model, max_batch=2, **options), PROMPTS, 9)
    made = generator(model, max_batch=2, lowering="inductor", **options)
    for prompt in (PROMPTS[0], PROMPTS[2]):  # a prefill of one block, one of several
        generate(made, [prompt], 6)
    warm = made.programs.compilations
    compiled = generate(made, PROMPTS, 9)
    assert [c.tokens for c in compiled] == [c.tokens for c in plain]
    assert len({step.listed for step in made.history}) > 4
    assert made.programs.compilations == warm
