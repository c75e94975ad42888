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


TOKENIZERS = {name: demo.load_tokenizer(name) for name in demo.MODELS}


@given(
    length=st.integers(192, 1500),
    response=st.sampled_from([32, 64, 128]),
    questions=st.integers(1, 3),
    kind=st.sampled_from(retrieval.KINDS),
    seed=st.integers(0, 10**6),
    model=st.sampled_from(list(demo.MODELS)),
)
@settings(deadline=None, max_examples=60)
def test_an_example_holds_what_it_asks_for(
    length: int,
    response: int,
    questions: int,
    kind: retrieval.Kind,
    seed: int,
    model: str,
) -> None:
    tokenizer = TOKENIZERS[model]
    example = retrieval.make(
        tokenizer,
        length,
        kind=kind,
        questions=questions,
        response=response,
        seed=seed,
        model=model,
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
    ("model", "kind", "digest"),
    [
        ("masked", "needle", "b2516966076ca5f1"),
        ("masked", "table", "944d07123bcac7c2"),
        ("block", "needle", "5f2c544be553ff68"),
        ("block", "table", "16f3da41033a4a75"),
    ],
)
def test_a_seed_keeps_its_example(model: str, kind: retrieval.Kind, digest: str) -> None:
    example = retrieval.make(TOKENIZERS[model], 512, kind=kind, seed=3, model=model)
    listed = str(example.prompt_ids).encode()
    assert hashlib.sha256(listed).hexdigest()[:16] == digest


def test_the_number_of_facts_can_be_given(tokenizer: Any) -> None:
    prompt = retrieval.make(tokenizer, 512, facts=9).prompt_ids
    assert tokenizer.decode(prompt).count("The secret word of") == 9
    most = tokenizer.decode(retrieval.make(tokenizer, 512, facts=10**6).prompt_ids)
    assert 20 < most.count("The secret word of") < 60


@pytest.mark.parametrize("model", demo.MODELS)
def test_keys_and_values_are_single_tokens(model: str) -> None:
    tokenizer = TOKENIZERS[model]
    words = (demo.model_path(model) / "words.txt").read_text().split()
    assert len(set(words)) == len(words)
    assert all(len(tokenizer(" " + w, add_special_tokens=False).input_ids) == 1 for w in words)


def test_the_block_model_is_asked_as_it_was_trained() -> None:
    """Token by token as examples/train_tiny puts it together: a key and a value are one token
    each, a comma another, and no token reaches across a piece's edge."""
    tokenizer = TOKENIZERS["block"]
    example = retrieval.make(tokenizer, 256, questions=2, response=32, seed=1, model="block")

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    keys = [ids(" " + key) for key, _ in example.pairs]
    question = [*ids("\nQuestion: What are the secret words of"), *keys[0], *ids(","), *keys[1]]
    question += ids("?<|response|>")
    assert list(example.prompt_ids[-len(question) :]) == question
    text = " " + " ".join(map(str, example.prompt_ids)) + " "
    for key, value in example.pairs:
        fact = ids(f"\nThe secret word of {key} is {value}.")
        assert ids(" " + key)[0] in fact
        assert ids(" " + value)[0] in fact
        assert " " + " ".join(map(str, fact)) + " " in text
    assert example.prompt_ids[:2] == (1, 4)


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
