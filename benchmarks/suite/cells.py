"""Cells of the suite: what is measured, in which order, and what may be measured once for many."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["ARMS", "BEYOND", "Cell", "Group", "arms_of", "groups_of", "key_of"]

ARMS = {
    "a": "vanilla, eager",
    "b": "vanilla, Inductor with cuDNN attention, block logits",
    "c": "Fast-dLLM dual cache, eager",
    "d": "dual cache, focus_compile",
    "e": "Focus-dLLM, eager",
    "f": "Focus-dLLM, FlexAttention",
    "g": "Focus-dLLM, focus_compile",
    "h": "the same with a partial refresh at block entry",
    "i": "the same, kept lists read for four steps",
}
UNGATED = {"refresh": "adaptive", "tolerance": 1e9}
"""Random weights say nothing of how far keys move: every block entry after the first renews the
share `refresh_rows`, and never more."""
BEYOND: dict[str, dict[str, Any]] = {"h": UNGATED, "i": UNGATED | {"list_reuse": 4}}
"""Arms with what the papers do not have, and the options that they add."""
FIRST_CONTEXTS = (32768, 8192)
FIRST_BLOCKS = (64, 32)


@dataclass(frozen=True)
class Cell:
    """One workload. `context` is the prompt; `alpha` matters to the focus arms only."""

    model: str
    context: int
    block: int
    per_step: int
    alpha: float

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Group:
    """Cells that share compiled programs: they differ in tokens per step, and with dynamic shapes
    in the context."""

    model: str
    contexts: tuple[int, ...]
    block: int
    alpha: float
    per_step: tuple[int, ...]

    @property
    def cells(self) -> list[Cell]:
        return [
            Cell(self.model, context, self.block, count, self.alpha)
            for context in self.contexts
            for count in self.per_step
        ]


def key_of(arm: str, cell: Cell) -> tuple[Any, ...]:
    """What the arm's times depend on. Vanilla computes all rows whatever the block; the dual
    cache computes the block whatever is committed."""
    if arm in "ab":
        return (arm, cell.model, cell.context)
    if arm in "cd":
        return (arm, cell.model, cell.context, cell.block)
    return (arm, cell.model, cell.context, cell.block, cell.per_step, cell.alpha)


def groups_of(
    model: str,
    contexts: Iterable[int],
    blocks: Iterable[int],
    per_step: Iterable[int],
    alphas: Iterable[float],
    dynamic: bool = False,
) -> list[Group]:
    """The most telling first: 32K and 8K, block 64, the largest alpha given first.

    dynamic: contexts share compiled programs.
    """
    steps = tuple(sorted(per_step))
    ordered = _first(contexts, FIRST_CONTEXTS)
    return [
        Group(model, together, block, alpha, steps)
        for together in ([tuple(ordered)] if dynamic else [(context,) for context in ordered])
        for alpha in alphas
        for block in _first(blocks, FIRST_BLOCKS)
    ]


def arms_of(text: str) -> dict[str, int | None]:
    """Arms by letter; a number behind a letter is the only block length that it is measured at.

    >>> arms_of("b,g,h32")
    {'b': None, 'g': None, 'h': 32}

    Raises:
        ValueError: a letter that names no arm.
    """
    found: dict[str, int | None] = {}
    for part in text.split(","):
        letter, block = part.strip()[:1], part.strip()[1:]
        if letter not in ARMS or not (block.isdecimal() or not block):
            known = ", ".join(ARMS)
            raise ValueError(f"no arm {part!r}; give letters of {known}, as in b,g,h32")
        found[letter] = int(block) if block else None
    return found


def _first(values: Iterable[int], preferred: tuple[int, ...]) -> list[int]:
    given = list(values)
    return [v for v in preferred if v in given] + [v for v in given if v not in preferred]
