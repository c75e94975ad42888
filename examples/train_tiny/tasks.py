"""Training examples made in bulk with numpy: retrieval, repeated spans, plain text.

A retrieval example is `<|bos|><|prompt|>`, a text with facts, the question, `<|response|>`, and the
response: ` KEY is VALUE;` for each key asked and the end token up to the last position. Keys, and
values unless they are five digits, are single tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from examples.train_tiny.prepare import BOS, EOS, PROMPT, RESPONSE

Ids = NDArray[np.int64]

TEXT, ANSWER, VALUE, REPEAT, END = range(5)
"""What a token is, for its weight in the loss and for the accuracies that are reported."""

MOST_FACTS = {"needle": 60, "table": 300}
DIGITS = 5  # of a value that is a number


@dataclass(frozen=True)
class Wording:
    """How facts and questions are put; {} and {} stand for key and value."""

    needle: str
    table: str
    question: str


WORDINGS = {
    "plain": Wording(
        "\nThe secret word of {} is {}.",
        "\n {} is {}",
        "\nQuestion: What are the secret words of{}?",
    ),
    "ruler": Wording(
        "\nOne of the special magic words for {} is: {}.",
        "\n {} is {}",
        "\nWhat are all the special magic words for{} mentioned in the provided text?",
    ),
}


@dataclass(frozen=True)
class Batch:
    """Examples of one length."""

    ids: Ids
    """[batch, length]"""
    kind: Ids
    """[batch, length]: TEXT, ANSWER, VALUE, REPEAT or END"""
    weight: NDArray[np.float32]
    """[batch, length]: of each token's loss where it is to be predicted."""

    @classmethod
    def of(cls, ids: Ids, kind: Ids, *, text: float) -> Batch:
        """A batch where TEXT weighs `text`, and the others what they always do."""
        return cls(ids, kind, np.array([text, 1, 3, 1, 0.1], dtype=np.float32)[kind])

    @staticmethod
    def join(batches: Sequence[Batch]) -> Batch:
        """All rows of `batches`, in that order."""
        return Batch(
            np.concatenate([batch.ids for batch in batches]),
            np.concatenate([batch.kind for batch in batches]),
            np.concatenate([batch.weight for batch in batches]),
        )


@dataclass(frozen=True)
class _Template:
    """A text as token ids with gaps for a key and a value."""

    ids: Ids
    """[tokens], of any value in the gaps"""
    key: int
    """Index of the key."""
    value: slice
    """Indices of the value."""

    def fill(self, keys: Ids, values: Ids) -> Ids:
        """keys [batch, facts], values [batch, facts, width]: [batch, facts, tokens]."""
        filled = np.broadcast_to(self.ids, (*keys.shape, len(self.ids))).copy()
        filled[:, :, self.key] = keys
        filled[:, :, self.value] = values
        return filled


class Corpus:
    """What `prepare` wrote: the texts as ids, and the words of the tasks."""

    def __init__(self, folder: Path, *, wording: str = "plain", words: int | None = None) -> None:
        """words: use only that many of the list."""
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokens = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r")
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self.starts: dict[str, int] = meta["starts"]
        self.vocabulary: int = meta["vocabulary"]
        self.words = (folder / "words.txt").read_text().split()[:words]
        self.word_ids = np.array([self._one(f" {word}") for word in self.words])
        self.digit_ids = np.array([self._one(str(digit)) for digit in range(10)])
        self.space = self._one(" ")
        self.comma = self._one(",")
        chosen = WORDINGS[wording]
        before, after = chosen.question.split("{}")
        self.question = (self.encode(before), np.append(self.encode(after), RESPONSE))
        self.facts = {"needle": chosen.needle, "table": chosen.table, "answer": " {} is {};"}

    def encode(self, text: str) -> Ids:
        """Token ids of `text`."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def template(self, name: str, *, digits: bool) -> _Template:
        """The template of a fact ("needle", "table") or of its statement ("answer")."""
        key = self.words[0]
        value = "0" * DIGITS if digits else self.words[1]
        ids = self.encode(self.facts[name].format(key, value))
        at = int(np.flatnonzero(ids == self.word_ids[0])[0])
        if digits:
            first = int(np.flatnonzero(ids == self.digit_ids[0])[0]) - 1  # the space before
            return _Template(ids, at, slice(first, first + 1 + DIGITS))
        first = int(np.flatnonzero(ids == self.word_ids[1])[0])
        return _Template(ids, at, slice(first, first + 1))

    def spans(self, rng: np.random.Generator, count: int, length: int, *, filler: bool) -> Ids:
        """[count, length]: random stretches of all texts, or of the one that hides facts."""
        least = self.starts["kjv"] if filler else 0
        starts = rng.integers(least, len(self.tokens) - length, count)
        return self.tokens[starts[:, None] + np.arange(length)].astype(np.int64)

    def values(self, rng: np.random.Generator, shape: tuple[int, ...], *, digits: bool) -> Ids:
        """[*shape, width]: random values."""
        if not digits:
            return rng.choice(self.word_ids, (*shape, 1))
        numbers = rng.choice(self.digit_ids, (*shape, DIGITS))
        return np.concatenate([np.full((*shape, 1), self.space), numbers], axis=-1)

    def _one(self, text: str) -> int:
        (token,) = self.encode(text)
        return int(token)


def retrieval(
    corpus: Corpus,
    rng: np.random.Generator,
    batch: int,
    length: int,
    *,
    kind: str,
    response: int,
    questions: int,
    facts: int | None = None,
    digits: bool = False,
) -> Batch:
    """`batch` examples with the same numbers of facts and questions.

    kind: "needle" scatters the facts, "table" puts them in one place. response: tokens left for
    the answer. facts: None draws how many; never more than fit.
    """
    fact = corpus.template(kind, digits=digits)
    answer = corpus.template("answer", digits=digits)
    before, after = corpus.question
    body = length - response - 2 - (len(before) + 2 * questions - 1 + len(after))
    most = min(body // len(fact.ids), len(corpus.words), MOST_FACTS[kind])
    if most < questions or questions * len(answer.ids) > response:
        raise ValueError(f"{length} tokens cannot hold {questions} questions of kind {kind}")
    count = int(rng.integers(questions, most + 1)) if facts is None else min(facts, most)
    keys = corpus.word_ids[_distinct(rng, batch, len(corpus.words), count)]
    values = corpus.values(rng, (batch, count), digits=digits)
    pieces = fact.fill(keys, values)

    asked = _distinct(rng, batch, count, questions)
    asked_keys = np.take_along_axis(keys, asked, 1)
    asked_values = np.take_along_axis(values, asked[:, :, None], 1)

    ids = np.full((batch, length), EOS)
    role = np.full((batch, length), TEXT)
    ids[:, 0], ids[:, 1] = BOS, PROMPT
    ids[:, 2 : 2 + body] = _scatter(corpus, rng, pieces, body, together=kind == "table")
    at = 2 + body
    ids[:, at : at + len(before)] = before
    at += len(before)
    ids[:, at + 1 : at + 2 * questions - 1 : 2] = corpus.comma
    ids[:, at : at + 2 * questions : 2] = asked_keys
    at += 2 * questions - 1
    ids[:, at : at + len(after)] = after
    at += len(after)
    said = answer.fill(asked_keys, asked_values).reshape(batch, -1)
    ids[:, at : at + said.shape[1]] = said
    roles = np.full(len(answer.ids), ANSWER)
    roles[answer.value] = VALUE
    role[:, at : at + said.shape[1]] = np.tile(roles, questions)
    role[:, at + said.shape[1] :] = END
    return Batch.of(ids, role, text=0.1)


def most_questions(
    corpus: Corpus, length: int, *, kind: str, response: int, digits: bool = False
) -> int:
    """How many questions an example can have; 0 where the sizes hold none."""
    fact = len(corpus.template(kind, digits=digits).ids)
    answer = len(corpus.template("answer", digits=digits).ids)
    frame = 2 + sum(map(len, corpus.question)) - 1
    fitting = min((length - response - frame) // (fact + 2), response // answer)
    return max(0, min(fitting, MOST_FACTS[kind], len(corpus.words)))


def repeat(corpus: Corpus, rng: np.random.Generator, batch: int, length: int) -> Batch:
    """A stretch of random words or of text over and over; what follows its first time is REPEAT.

    Each row has a period of its own, between an eighth and half of the length.
    """
    period = rng.integers(length // 8, length // 2 + 1, (batch, 1))
    spans = corpus.spans(rng, batch, length // 2, filler=False)
    of_words = rng.random(batch) < 0.7
    spans[of_words] = rng.choice(corpus.word_ids, (int(of_words.sum()), length // 2))
    at = np.arange(length - 1)
    ids = np.full((batch, length), BOS)
    ids[:, 1:] = np.take_along_axis(spans, at % period, 1)
    kind = np.full((batch, length), TEXT)
    kind[:, 1:][at >= period] = REPEAT
    return Batch.of(ids, kind, text=0.1)


def text(corpus: Corpus, rng: np.random.Generator, batch: int, length: int) -> Batch:
    """Stretches of the texts."""
    ids = corpus.spans(rng, batch, length, filler=False)
    ids[:, 0] = BOS
    return Batch.of(ids, np.full((batch, length), TEXT), text=1)


def _scatter(
    corpus: Corpus, rng: np.random.Generator, pieces: Ids, length: int, *, together: bool
) -> Ids:
    """[batch, length]: a text with pieces [batch, facts, tokens] at random places or in one."""
    batch, count, width = pieces.shape
    room = length - count * width
    cuts = rng.integers(0, room + 1, (batch, 1 if together else count))
    cuts = np.sort(np.broadcast_to(cuts, (batch, count)), axis=1)
    at = (cuts + width * np.arange(count))[:, :, None] + np.arange(width)
    at = at.reshape(batch, -1)
    free = np.ones((batch, length), dtype=bool)
    np.put_along_axis(free, at, False, 1)
    filler = corpus.spans(rng, batch, room + 1, filler=True)
    order = np.minimum(np.cumsum(free, axis=1) - 1, room).clip(0)
    body = np.take_along_axis(filler, order, 1)
    np.put_along_axis(body, at, pieces.reshape(batch, -1), 1)
    return body


def _distinct(rng: np.random.Generator, rows: int, among: int, count: int) -> Ids:
    """[rows, count]: numbers below `among`, distinct in each row, in random order."""
    return rng.random((rows, among), dtype=np.float32).argsort(axis=1)[:, :count]
