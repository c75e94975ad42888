"""Cells of the suite: what is measured, in which order, and what may be measured once for many."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["ARMS", "Cell", "groups_of", "key_of"]

ARMS = {
    "a": "vanilla, eager",
    "b": "vanilla, Inductor with cuDNN attention, block logits",
    "c": "Fast-dLLM dual cache, eager",
    "d": "dual cache, focus_compile",
    "e": "Focus-dLLM, eager",
    "f": "Focus-dLLM, FlexAttention",
    "g": "Focus-dLLM, focus_compile",
}
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
    """Cells that share compiled programs: they differ in tokens per step only."""

    model: str
    context: int
    block: int
    alpha: float
    per_step: tuple[int, ...]

    @property
    def cells(self) -> list[Cell]:
        return [Cell(self.model, self.context, self.block, u, self.alpha) for u in self.per_step]


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
) -> list[Group]:
    """The most telling first: 32K and 8K, block 64, the largest alpha given first."""
    steps = tuple(sorted(per_step))
    return [
        Group(model, context, block, alpha, steps)
        for context in _first(contexts, FIRST_CONTEXTS)
        for alpha in alphas
        for block in _first(blocks, FIRST_BLOCKS)
    ]


def _first(values: Iterable[int], preferred: tuple[int, ...]) -> list[int]:
    given = list(values)
    return [v for v in preferred if v in given] + [v for v in given if v not in preferred]
