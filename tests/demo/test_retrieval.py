"""The retrieval task: what an example holds, and that seeds never change their meaning."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from focus_compile import demo
from focus_compile.demo import retrieval
from focus_compile.errors import OptionError

RESPONSE_START = "<|response|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return demo.load_tokenizer()


@given(
    length=st.integers(192, 1500),
    response=st.sampled_from([32, 64, 128]),
    questions=st.integers(1, 3),
    kind=st.sampled_from(retrieval.KINDS),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=40)
def test_an_example_holds_what_it_asks_for(
    tokenizer: Any,
    length: int,
    response: int,
    questions: int,
    kind: retrieval.Kind,
    seed: int,
) -> None:
    example = retrieval.make(
        tokenizer, length, kind=kind, questions=questions, response=response, seed=seed
    )
    assert len(example.prompt_ids) == length - response
    assert len(set(example.pairs)) == questions
    text = tokenizer.decode(example.prompt_ids)
    assert text.startswith("<|bos|><|prompt|>")
    assert text.endswith("?" + RESPONSE_START)
    fact = {"needle": "The secret word of {} is {}.", "table": "\n {} is {}"}[kind]
    for pair in example.pairs:
        assert fact.format(*pair) in text
    keys = ", ".join(key for key, _ in example.pairs)
    assert f"Question: What are the secret words of {keys}?" in text


@pytest.mark.parametrize(
    ("kind", "digest"), [("needle", "b2516966076ca5f1"), ("table", "944d07123bcac7c2")]
)
def test_a_seed_keeps_its_example(tokenizer: Any, kind: retrieval.Kind, digest: str) -> None:
    example = retrieval.make(tokenizer, 512, kind=kind, seed=3)
    listed = str(example.prompt_ids).encode()
    assert hashlib.sha256(listed).hexdigest()[:16] == digest


def test_the_number_of_facts_can_be_given(tokenizer: Any) -> None:
    prompt = retrieval.make(tokenizer, 512, facts=9).prompt_ids
    assert tokenizer.decode(prompt).count("The secret word of") == 9
    most = tokenizer.decode(retrieval.make(tokenizer, 512, facts=10**6).prompt_ids)
    assert 20 < most.count("The secret word of") < 60


def test_keys_and_values_are_single_tokens(tokenizer: Any) -> None:
    words = (demo.MODEL_PATH / "words.txt").read_text().split()
    assert len(set(words)) == len(words)
    assert all(len(tokenizer(" " + w, add_special_tokens=False).input_ids) == 1 for w in words)


def test_scores_pairs_as_a_whole() -> None:
    example = retrieval.Example((), (("king", "happy"), ("road", "blue")))
    assert example.score(" king is happy; road is blue;") == 2
    assert example.marks(" king is happ; road is blue;") == (False, True)
    assert example.score(" king is happy, road is bluer;") == 0


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (80, {}, "80 tokens cannot hold 4 facts"),
        (64, {"response": 128}, "cannot hold"),
        (512, {"kind": "nedle"}, "did you mean 'needle'"),
        (512, {"questions": 0}, "questions=0"),
        (100_000, {}, "filler text is too short"),
    ],
)
def test_bad_requests(tokenizer: Any, length: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        retrieval.make(tokenizer, length, **options)
