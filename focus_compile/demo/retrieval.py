"""The retrieval task: facts hidden in a long text, and a question that asks for some of them.

"needle" scatters sentences `The secret word of KEY is VALUE.` through the text, "table" puts all
facts in one place as lines ` KEY is VALUE`. A right answer says `KEY is VALUE;` for each key asked.
Keys and values are single tokens of the bundled model's vocabulary, so a value is right or wrong
as a whole. Each bundled model has words and a filler text of its own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from focus_compile.demo import model_path
from focus_compile.errors import OptionError

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

    def marks(self, text: str) -> tuple[bool, ...]:
        """Whether the decoded response states each pair."""
        return tuple(f"{key} is {value};" in text for key, value in self.pairs)

    def score(self, text: str) -> int:
        """How many of the pairs the decoded response states."""
        return sum(self.marks(text))


def make(
    tokenizer: Any,
    length: int,
    *,
    kind: Kind = "needle",
    questions: int = 4,
    facts: int | None = None,
    response: int = 64,
    seed: int = 0,
    model: str = "masked",
) -> Example:
    """One example whose prompt and response together are exactly `length` tokens.

    length: tokens of prompt and response. questions: how many facts are asked for. facts: how many
    the text holds, at most what fits; None draws a number. response: tokens left for the answer.
    model: the bundled model that is asked, whose tokenizer it is.
    The same arguments always give the same example. Raises OptionError where the text cannot hold
    the facts asked for.
    """
    kind = as_kind(kind)
    if questions < 1:
        raise OptionError.invalid("questions", questions, "a whole number >= 1")
    rng = random.Random(f"{seed}-{kind}-{length}-{questions}")
    fact = _FACT[kind]
    budget = length - response
    words, filler = _texts(model)
    fact_tokens = len(_tokens(tokenizer, fact.format(*words[:2])))
    most = (budget - _FRAME_TOKENS - 2 * questions) // fact_tokens
    ceiling = max(questions, min(most, _MOST_FACTS[kind]))
    count = min(most, len(words), facts or rng.randint(questions, ceiling))
    if count < questions:
        raise OptionError(
            f"{length} tokens cannot hold {questions} facts and a response of {response} tokens; "
            "ask for fewer questions or a greater length"
        )
    pairs = [(key, rng.choice(words)) for key in rng.sample(words, count)]
    asked = rng.sample(pairs, questions)
    keys = ", ".join(key for key, _ in asked)
    question = _tokens(tokenizer, f"\nQuestion: What are the secret words of {keys}?<|response|>")
    pieces = [_tokens(tokenizer, fact.format(*pair)) for pair in pairs]
    room = budget - len(question) - 2 - sum(map(len, pieces))
    span = _CHARACTERS_PER_TOKEN * room
    if span + 100 >= len(filler):
        raise OptionError(f"the filler text is too short for {length} tokens")
    start = rng.randrange(len(filler) - span - 100)
    text = _tokens(tokenizer, filler[start : start + span + 64])[:room]
    body = _tokens(tokenizer, "<|bos|><|prompt|>") + _scatter(rng, kind, text, pieces) + question
    return Example(tuple(body), tuple(asked))


def as_kind(name: str) -> Kind:
    """The kind of that name; OptionError with the closest one if there is none."""
    for kind in KINDS:
        if kind == name:
            return kind
    raise OptionError.unknown(name, KINDS, kind="kind of question")


@cache
def _texts(model: str) -> tuple[list[str], str]:
    """The words that serve as keys and values, and the text that facts are hidden in."""
    folder = model_path(model)
    words = (folder / "words.txt").read_text(encoding="utf-8").split()
    return words, (folder / "filler.txt").read_text(encoding="utf-8")


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
