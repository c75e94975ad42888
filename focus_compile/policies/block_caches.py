"""Fast-dLLM's caches (arXiv 2505.22618) as policies: rows by decode block, all keys."""

from __future__ import annotations

from dataclasses import dataclass

from focus_compile.policies.base import Selection, StepView

__all__ = ["DualCache", "PrefixCache"]


@dataclass(frozen=True)
class DualCache:
    """Rows: the current decode block; K/V before and after it stay as cached."""

    def select(self, view: StepView) -> Selection:
        active = view.in_current_block()
        return Selection(active, active & view.masked)


@dataclass(frozen=True)
class PrefixCache:
    """Rows: everything from the current decode block on; K/V before it stay as cached."""

    def select(self, view: StepView) -> Selection:
        active = view.from_current_block()
        return Selection(active, view.in_current_block() & view.masked)
