"""What decoding took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

__all__ = ["Work"]


@dataclass(frozen=True, slots=True)
class Work:
    """What the responses of a run took; adds up."""

    responses: int = 0
    tokens: int = 0
    """Decoded, whether or not they are part of the answer."""
    model_calls: int = 0
    rows: int = 0
    """Token rows that went through all layers, over all calls."""
    seconds: float = 0.0
    """Decoding, with the compilation that it set off."""
    compile_seconds: float = 0.0
    """The part of it spent compiling the model."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.responses + other.responses,
            self.tokens + other.tokens,
            self.model_calls + other.model_calls,
            self.rows + other.rows,
            self.seconds + other.seconds,
            self.compile_seconds + other.compile_seconds,
        )

    @classmethod
    def side_by_side(cls, works: Iterable[Work]) -> Work:
        """Of processes that ran at the same time: counts add up, the longest one is the time."""
        works = list(works)
        slowest = max(works, key=lambda work: work.seconds)
        return replace(
            sum(works, cls()), seconds=slowest.seconds, compile_seconds=slowest.compile_seconds
        )
