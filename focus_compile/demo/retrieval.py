"""The retrieval task: facts hidden in a long text, and a question that asks for some of them.

"needle" scatters sentences `The secret word of KEY is VALUE.` through the text, "table" puts all
facts in one place as lines ` KEY is VALUE`. A right answer says `KEY is VALUE;` for each key asked.
Keys and values are single tokens of the bundled model's vocabulary, so a value is right or wrong
as a whole.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from focus_compile.demo import MODEL_PATH

Kind = Literal["needle", "table"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_FACT = {"needle": "\nThe secret word of {} is {}.", "table": "\n {} is {}"}
_MOST_FACTS = {"needle": 60, "table": 300}
_FRAME_TOKENS = 20  # start tokens, the question's fixed words, and a little room to spare
_CHARACTERS_PER_TOKEN = 8  # more than any stretch of the filler needs


@dataclass(frozen=True, slots=True)
class Example:
    """One question."""

    prompt_ids: tuple[int, ...]
    """The whole prompt, `length - response` token ids."""
    pairs: tuple[tuple[str, str], ...]
    """The (key, value) pairs asked for."""

    def score(self, text: str) -> int:
        """How many of the pairs the decoded response states."""
        return score(text, self.pairs)


def make(
    tokenizer: Any,
    length: int,
    *,
    kind: Kind = "needle",
    questions: int = 4,
    facts: int | None = None,
    response: int = 64,
    seed: int = 0,
) -> Example:
    """One example whose prompt and response together are exactly `length` tokens.

    length: tokens of prompt and response. questions: how many facts are asked for. facts: how many
    the text holds, at most what fits; None draws a number. response: tokens left for the answer.
    The same arguments always give the same example. Raises ValueError where the text cannot hold
    the facts asked for.
    """
    _check(kind, questions)
    rng = random.Random(f"{seed}-{kind}-{length}-{questions}")
    fact = _FACT[kind]
    budget = length - response
    fact_tokens = len(_tokens(tokenizer, fact.format("king", "happy")))
    most = (budget - _FRAME_TOKENS - 2 * questions) // fact_tokens
    ceiling = max(questions, min(most, _MOST_FACTS[kind]))
    count = min(most, facts or rng.randint(questions, ceiling))
    if count < questions:
        raise ValueError(
            f"{length} tokens cannot hold {questions} facts and a response of {response} tokens; "
            "ask for fewer questions or a greater length"
        )
    words, filler = _texts()
    pairs = [(key, rng.choice(words)) for key in rng.sample(words, count)]
    asked = rng.sample(pairs, questions)
    keys = ", ".join(key for key, _ in asked)
    question = _tokens(tokenizer, f"\nQuestion: What are the secret words of {keys}?<|response|>")
    pieces = [_tokens(tokenizer, fact.format(*pair)) for pair in pairs]
    room = budget - len(question) - 2 - sum(map(len, pieces))
    span = _CHARACTERS_PER_TOKEN * room
    if span + 100 >= len(filler):
        raise ValueError(f"the filler text is too short for {length} tokens")
    start = rng.randrange(len(filler) - span - 100)
    text = _tokens(tokenizer, filler[start : start + span + 64])[:room]
    body = _tokens(tokenizer, "<|bos|><|prompt|>") + _scatter(rng, kind, text, pieces) + question
    return Example(tuple(body), tuple(asked))


def score(text: str, pairs: Sequence[tuple[str, str]]) -> int:
    """How many of the (key, value) pairs the decoded response states."""
    return sum(f"{key} is {value};" in text for key, value in pairs)


@cache
def _texts() -> tuple[list[str], str]:
    """The words that serve as keys and values, and the text that facts are hidden in."""
    words = (MODEL_PATH / "words.txt").read_text(encoding="utf-8").split()
    return words, (MODEL_PATH / "filler.txt").read_text(encoding="utf-8")


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _scatter(rng: random.Random, kind: Kind, text: list[int], pieces: list[list[int]]) -> list[int]:
    """The text with every piece put in at its own place (needle) or all at one place (table)."""
    if kind == "needle":
        cuts = sorted(rng.randint(0, len(text)) for _ in pieces)
    else:
        cuts = [rng.randint(0, len(text))] * len(pieces)
    body: list[int] = []
    last = 0
    for cut, piece in zip(cuts, pieces, strict=True):
        body += text[last:cut] + piece
        last = cut
    return body + text[last:]


def _check(kind: str, questions: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if questions < 1:
        raise ValueError(f"questions must be at least 1, not {questions}")
