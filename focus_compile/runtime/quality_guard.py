"""`guard=`: some steps are also answered densely, and where the answers part the runtime backs off.

A guarded call runs its step, then a refresh of the same ids, and returns the refresh's logits. What
the step would have decided is compared with what the refresh decides.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["LEVELS", "Check", "QualityGuard", "check_answers"]

LEVELS = ("as configured", "all keys", "all keys, refresh every 8 calls", "refresh every call")
"""What is done, from the first on, as long as answers part too often."""
EVERY = 8
"""Calls between the refreshes of the third level."""
WINDOW = 32
"""Positions judged last, which the agreement is taken over."""
FEWEST = 4
"""Positions judged before it counts."""
PROBATION = 256
"""Calls at a level after which the one before it is tried again."""
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class Check:
    """One guarded call. agreement: share of the positions judged at which step and refresh have the
    same token; drift: mean difference of their confidence; positions: how many were judged."""

    agreement: float
    drift: float
    positions: int


@dataclass
class QualityGuard:
    """What guarded calls of one model found, and the level that follows from it."""

    level: int = 0
    calls: int = 0
    """Calls that could have been guarded."""
    checks: int = 0
    rows: int = 0
    """Rows computed by steps and refreshes of calls that could have been guarded."""
    guard_rows: int = 0
    """Those of them that only the guard asked for."""
    drift: float = 0.0
    """Mean over all checks."""
    _at_level: int = 0
    _seen: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def due(self, share: float) -> bool:
        """Whether a step is guarded: evenly spread, in step with no period of a loop."""
        self.calls += 1
        return share > 0 and (self.calls * GOLDEN) % 1.0 < share

    def reads_all_keys(self) -> bool:
        """Whether no key is to be left out. Asked once a call: after long enough at a level the one
        before it is tried again."""
        self._at_level += 1
        if self.level and self._at_level > PROBATION:
            self._to(self.level - 1)
        return self.level >= 1

    def refreshes(self) -> bool:
        """Whether a refresh is to be one of all rows."""
        return self.level >= 2

    def backs_off(self, steps_since_refresh: int) -> bool:
        """Whether the level asks for a refresh now."""
        every = (math.inf, math.inf, EVERY, 1)[self.level]
        return steps_since_refresh + 1 >= every

    @property
    def measure(self) -> str:
        """What the level does."""
        return LEVELS[self.level]

    @property
    def agreement(self) -> float | None:
        """Over the latest positions at this level; None before any."""
        total = sum(count for _, count in self._seen)
        agreed = sum(share * count for share, count in self._seen)
        return agreed / total if total else None

    @property
    def cost(self) -> float:
        """Of all rows computed, the share that only the guard asked for."""
        return self.guard_rows / self.rows if self.rows else 0.0

    def note(self, check: Check, bar: float) -> None:
        """Take in a check; one level up where the agreement is below `bar`."""
        if not check.positions:
            return
        self.checks += 1
        self.drift += (check.drift - self.drift) / self.checks
        self._seen.append((check.agreement, check.positions))
        judged = sum(count for _, count in self._seen)
        agreement = self.agreement
        if judged >= FEWEST and agreement is not None and agreement < bar:
            self._to(min(self.level + 1, len(LEVELS) - 1))

    def _to(self, level: int) -> None:
        if level != self.level:
            self.level, self._at_level = level, 0
            self._seen.clear()

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "level": self.measure,
            "calls": self.calls,
            "checks": self.checks,
            "agreement": self.agreement,
            "drift": self.drift,
            "cost": self.cost,
        }

    def __str__(self) -> str:
        if not self.checks:
            return "no call guarded yet"
        agreement = self.agreement
        recent = "none yet" if agreement is None else f"{agreement:.3f}"
        return (
            f"{self.checks} of {self.calls} calls guarded, agreement {recent} at this level "
            f"({self.measure}), confidence drift {self.drift:.3g}, "
            f"{self.cost:.0%} of the rows computed for it"
        )


def check_answers(
    focus: Tensor,
    decided: int,
    step: tuple[Tensor, Tensor],
    dense: tuple[Tensor, Tensor],
) -> Check:
    """Compare the positions that a step would have had decided.

    Args:
        focus: bool [batch, length], the rows that score undecided positions.
        decided: positions of a sequence that are decided a call, at least 1.
        step, dense: (confidence fp32, its token int64), each [batch, length].
    """
    confidence, token = step
    scores = confidence.masked_fill(~focus, -1.0)
    top, at = scores.topk(min(max(decided, 1), focus.shape[1]), dim=1)
    real = top >= 0
    same = (token.gather(1, at) == dense[1].gather(1, at)) & real
    drift = (top - dense[0].gather(1, at)).abs() * real
    count, agreed, moved = torch.stack([real.sum(), same.sum(), drift.sum()]).tolist()
    count = int(count)
    return Check(agreed / max(count, 1), moved / max(count, 1), count)
