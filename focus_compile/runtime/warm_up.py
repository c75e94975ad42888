"""Compiling and capturing before the first prompt arrives: `focus_compile.warmup`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass

from focus_compile.runtime.buckets import bucket_for

__all__ = ["WarmUp", "asked_for", "buckets_within", "warming_up"]

MOST_ROWS = 256
"""Larger buckets are rare, and are captured when they are met."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What a warm-up prepared for one graph of the model.

    buckets: row counts whose step has run; graphs: CUDA graphs captured over the trajectory's
    tensors, 0 on the CPU; compile_seconds: the part of the warm-up spent compiling.
    """

    buckets: tuple[int, ...]
    graphs: int
    compile_seconds: float


_asked: contextvars.ContextVar[list[WarmUp] | None] = contextvars.ContextVar(
    "focus_compile_warm_up", default=None
)


def asked_for() -> list[WarmUp] | None:
    """Where the call at hand must say what it prepared; None in an ordinary call."""
    return _asked.get()


@contextlib.contextmanager
def warming_up() -> Iterator[list[WarmUp]]:
    """Calls inside prepare all their buckets."""
    found: list[WarmUp] = []
    token = _asked.set(found)
    try:
        yield found
    finally:
        _asked.reset(token)


def buckets_within(
    rows: int, ladder: tuple[int, ...] | None, length: int, device_type: str
) -> tuple[int, ...]:
    """The buckets of 1 to `rows` active rows, at most `MOST_ROWS` of them, ascending."""
    counts = range(1, min(rows, MOST_ROWS) + 1)
    return tuple(sorted({bucket_for(count, ladder, length, device_type) for count in counts}))
