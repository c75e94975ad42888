"""Requests of a `BatchGenerator`: what is asked, when a response ends, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from focus_compile.errors import OptionError

__all__ = [
    "Completion",
    "Request",
    "check_whole",
    "completion_of",
    "is_number",
    "stop_at",
    "token_ids",
    "tokens_of",
]


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. tokens: what was generated, without the prompt; reason: "stop" (which is
    left out of the tokens) or "length"."""

    request: int
    tokens: tuple[int, ...]
    reason: str
    steps: int
    """Decode steps in which it took part, commits included."""


@dataclass
class Request:
    number: int
    prompt: list[int]
    limit: int
    stops: tuple[tuple[int, ...], ...]
    tokens: list[int] = field(default_factory=list)
    steps: int = 0


def stop_at(
    tokens: list[int], known: int, stops: Sequence[tuple[int, ...]], eos: frozenset[int]
) -> int | None:
    """Where the first stop begins that ends after the `known` first tokens."""
    found = [at for at in range(known, len(tokens)) if tokens[at] in eos][:1]
    for stop in stops:
        first = max(0, known - len(stop) + 1)
        found += [
            at
            for at in range(first, len(tokens) - len(stop) + 1)
            if tuple(tokens[at : at + len(stop)]) == stop
        ][:1]
    return min(found, default=None)


def completion_of(request: Request, reason: str) -> Completion:
    return Completion(request.number, tuple(request.tokens), reason, request.steps)


def token_ids(given: int | Sequence[int] | None) -> frozenset[int]:
    if given is None:
        return frozenset()
    return frozenset(tokens_of("eos_token_id", [given] if isinstance(given, int) else given))


def tokens_of(name: str, given: Any) -> list[int]:
    """Token ids as they were given."""
    expected = "a sequence of token ids"
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise OptionError.invalid(name, given, expected)
    tokens = list(given)
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, Integral) or int(token) < 0:
            raise OptionError.invalid(name, given, expected)
    return [int(token) for token in tokens]


def check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError.invalid(name, value, f"a whole number >= {least}")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
