"""What happened in each call: `with focus_compile.record() as history:`."""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["StepRecord", "is_watched", "note", "record"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One model call.

    program: "exact", "refresh", "partial" (some rows, with all keys) or "step"; why: what decided
    it. rows: rows computed, over the batch. bucket: the padded rows per sequence of a step. kept:
    rows that went through all layers, where some were evicted. keys: keys read by each layer of a
    region, sequence 0 (counting a sink inside a kept block once more). recall: of the positions
    that the caller decided since the previous call, the share that its step had predicted (None
    after a refresh, which computes every row, and where nothing was decided). prompt_rows: rows
    before the response that a refresh or a partial one computed. error: of a partial refresh, what
    it leaves, as `FocusConfig.tolerance` has it. chosen: with `list_reuse`, whether a step chose
    the keys of its sparse layers, or read those of an earlier one. agreement, drift: of a call that
    was also answered by a step, the share of positions at which both have the same token, and the
    mean difference of their confidence. milliseconds: host time of the call; compile_seconds: the
    part of it spent compiling.
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
    prompt_rows: int | None = None
    error: float | None = None
    chosen: bool | None = None
    agreement: float | None = None
    drift: float | None = None

    def __str__(self) -> str:
        said = [f"{self.program}: {self.why}", f"{self.rows} rows"]
        if self.bucket is not None:
            said.append(f"padded to {self.bucket}")
        if self.kept is not None and self.kept != self.rows:
            said.append(f"{self.kept} of them through all layers")
        if self.keys:
            said.append("keys " + ", ".join(f"{name} {n}" for name, n in self.keys.items()))
        said += [f"{name} {value:.2g}" for name, value in self._shares() if value is not None]
        return f"{'; '.join(said)}; {self.milliseconds:.1f} ms"

    def _shares(self) -> tuple[tuple[str, float | None], ...]:
        return (
            ("recall", self.recall),
            ("error", self.error),
            ("agreement", self.agreement),
            ("drift", self.drift),
        )


_history: contextvars.ContextVar[list[StepRecord] | None] = contextvars.ContextVar(
    "focus_compile_history", default=None
)


def is_watched() -> bool:
    """Whether calls of this context are recorded or logged."""
    return _history.get() is not None or log.isEnabledFor(logging.DEBUG)


def note(entry: StepRecord) -> None:
    """Record and log a call."""
    log.debug("%s", entry)
    history = _history.get()
    if history is not None:
        history.append(entry)


@contextlib.contextmanager
def record() -> Iterator[list[StepRecord]]:
    """Collect one StepRecord per call of any focus-compiled model in this context."""
    history: list[StepRecord] = []
    token = _history.set(history)
    try:
        yield history
    finally:
        _history.reset(token)
