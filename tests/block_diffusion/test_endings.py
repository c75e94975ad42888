"""Where a response ends, and what is left of it."""

from __future__ import annotations

from typing import Any

import pytest

from focus_compile.block_diffusion.batch_generator import Completion
from tests.block_diffusion.tiny import MASK, decoder, generate, generator

BLOCK = 4
PROMPT = [3, 1, 4, 1, 5]


def complete(
    prompt: list[int], tokens: int = 24, stop: Any = (), max_length: int = 48, **options: Any
) -> Completion:
    made = generator(
        decoder("qwen3"), block_length=BLOCK, max_batch=1, max_length=max_length, threshold=0.5,
        **options,
    )  # fmt: skip
    [completion] = generate(made, [prompt], tokens, stop=stop)
    return completion


@pytest.fixture(scope="module")
def response() -> tuple[int, ...]:
    """What follows PROMPT where nothing stops it; the first block takes 3 tokens of it."""
    completion = complete(PROMPT)
    assert completion.reason == "length"
    assert len(completion.tokens) == 24
    assert MASK not in completion.tokens
    assert len(set(completion.tokens)) > 5
    return completion.tokens


def first(response: tuple[int, ...], stop: tuple[int, ...]) -> int:
    starts = range(len(response) - len(stop) + 1)
    return next(at for at in starts if response[at : at + len(stop)] == stop)


@pytest.mark.parametrize("at", range(12))
def test_a_stop_token_is_left_out(response: tuple[int, ...], at: int) -> None:
    end = first(response, (response[at],))
    for completion in (
        complete(PROMPT, eos_token_id=response[at]),
        complete(PROMPT, eos_token_id=[MASK, response[at]]),
        complete(PROMPT, stop=[[response[at]]]),
    ):
        assert completion.tokens == response[:end]
        assert completion.reason == "stop"


@pytest.mark.parametrize("at", range(1, 8))
@pytest.mark.parametrize("length", [2, 3, 6])
def test_a_stop_sequence_may_span_blocks(response: tuple[int, ...], at: int, length: int) -> None:
    """Blocks of the response end behind 3, 7, 11 tokens."""
    stop = response[at : at + length]
    completion = complete(PROMPT, stop=[stop])
    assert completion.tokens == response[: first(response, stop)]
    assert completion.reason == "stop"


def test_the_first_of_several_stops_ends_it(response: tuple[int, ...]) -> None:
    stops = [response[6:8], response[1:3], response[4:5]]
    completion = complete(PROMPT, stop=stops)
    assert completion.tokens == response[: min(first(response, stop) for stop in stops)]


def test_a_stop_sequence_that_is_not_finished_ends_nothing(response: tuple[int, ...]) -> None:
    other = next(t for t in range(MASK) if t not in response)
    completion = complete(PROMPT, stop=[(*response[2:5], other), (other,)], eos_token_id=other)
    assert (completion.tokens, completion.reason) == (response, "length")


def test_what_the_prompt_says_ends_nothing(response: tuple[int, ...]) -> None:
    """Not even in the block that the prompt shares with the response, nor half of a sequence."""
    prompt = [*PROMPT[:4], next(t for t in range(MASK) if t not in response)]
    plain = complete(prompt)
    assert prompt[4] not in plain.tokens
    stop = [prompt[4], plain.tokens[0]]
    assert complete(prompt, eos_token_id=prompt[4], stop=[stop]).tokens == plain.tokens


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8, 10])
def test_the_limit_may_lie_inside_a_block(response: tuple[int, ...], tokens: int) -> None:
    completion = complete(PROMPT, tokens)
    assert completion.tokens == response[:tokens]
    assert completion.reason == "length"


def test_a_stop_behind_the_limit_is_not_seen(response: tuple[int, ...]) -> None:
    """Nor one that begins in front of it."""
    assert first(response, response[1:3]) == 1
    for stop in (response[2:3], response[1:3]):
        completion = complete(PROMPT, 2, stop=[stop])
        assert (completion.tokens, completion.reason) == (response[:2], "length")


def test_a_stop_that_ends_with_the_limit_is_seen(response: tuple[int, ...]) -> None:
    completion = complete(PROMPT, 3, stop=[response[1:3]])
    assert (completion.tokens, completion.reason) == (response[:1], "stop")


@pytest.mark.parametrize("given", [1, 3, 4, 7, 11])
def test_the_window_ends_it(given: int) -> None:
    """max_length is rounded up to blocks: 12 tokens, prompt and response."""
    prompt = [(7 * at) % MASK for at in range(given)]
    completion = complete(prompt, 100, max_length=10)
    assert (len(completion.tokens), completion.reason) == (12 - given, "length")
    assert completion.tokens == complete(prompt).tokens[: 12 - given]


def test_steps_are_counted_with_commits() -> None:
    """Two blocks and the commit between them, each decided at once; the last is not committed."""
    made = generator(decoder("qwen3"), block_length=BLOCK, max_batch=2, policy="block-diffusion",
                     threshold=0.0)  # fmt: skip
    first_, second = generate(made, [[1] * 4, [2] * 7], 5)
    assert (first_.steps, second.steps) == (3, 3)
    assert [(s.sequences, s.decoded) for s in made.history] == [(2, 5), (2, 0), (2, 8)]
