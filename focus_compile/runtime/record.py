"""What happened in each call: `with focus_compile.record() as history:`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["StepRecord", "active_history", "record"]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One model call.

    program: "exact", "refresh" or "step"; why: what decided it. rows: rows computed, over the
    batch. bucket: the padded rows per sequence of a step. kept: rows that went through all layers,
    where some were evicted. keys: keys read by each layer of a
    region, sequence 0 (counting a sink inside a kept block once more). recall: of the positions
    that the caller decided since the previous call, the share that its step had predicted (None
    after a refresh, which computes every row, and where nothing was decided). milliseconds: host
    time of the call; compile_seconds: the part of it spent compiling.
    """

    program: str
    why: str
    rows: int
    bucket: int | None = None
    keys: dict[str, int] = field(default_factory=dict)
    recall: float | None = None
    milliseconds: float = 0.0
    compile_seconds: float = 0.0
    kept: int | None = None


_history: contextvars.ContextVar[list[StepRecord] | None] = contextvars.ContextVar(
    "focus_compile_history", default=None
)


def active_history() -> list[StepRecord] | None:
    """The list that calls of this context are recorded in, if any."""
    return _history.get()


@contextlib.contextmanager
def record() -> Iterator[list[StepRecord]]:
    """Collect one StepRecord per call of any focus-compiled model in this context."""
    history: list[StepRecord] = []
    token = _history.set(history)
    try:
        yield history
    finally:
        _history.reset(token)
