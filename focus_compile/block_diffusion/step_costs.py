"""Whether eviction pays: milliseconds per decoded token with it and without, as measured."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

__all__ = ["StepCosts"]

WARM_UP = 2
"""Steps of a size that compile, load and capture."""
TRIALS = 3
"""Steps after those that are measured before a choice is made."""
REMEMBERED = 16
RETRY = 128
"""Choices after which the other way is measured once more."""


@dataclass
class _Way:
    seen: int = 0
    measured: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def per_token(self) -> float:
        milliseconds = sum(one for one, _ in self.measured)
        return milliseconds / max(1, sum(decoded for _, decoded in self.measured))


@dataclass
class StepCosts:
    """Steps by their padded number of listed rows, evicting (True) and whole (False); large numbers
    that are close to one another are one."""

    _ways: dict[tuple[int, bool], _Way] = field(default_factory=dict)
    _chosen: dict[int, int] = field(default_factory=dict)

    def evict(self, rows: int) -> bool:
        """Whether a step of so many rows had better evict."""
        ways = {evicts: self._way(rows, evicts) for evicts in (False, True)}
        for evicts, way in ways.items():
            if way.seen < WARM_UP + TRIALS:
                return evicts
        size = _size(rows)
        choices = self._chosen[size] = self._chosen.get(size, 0) + 1
        faster = ways[True].per_token() < ways[False].per_token()
        return faster if choices % RETRY else not faster

    def measured(self, rows: int, evicts: bool, milliseconds: float, decoded: int) -> None:
        """A step took so long, with the read of its results."""
        way = self._way(rows, evicts)
        way.seen += 1
        if way.seen > WARM_UP:
            way.measured.append((milliseconds, decoded))

    def to_dict(self) -> dict[str, dict[str, float | int | None]]:
        """Milliseconds per decoded token by rows, JSON types."""
        found: dict[str, dict[str, float | int | None]] = {}
        for (rows, evicts), way in sorted(self._ways.items()):
            name = "evicting" if evicts else "whole"
            found.setdefault(str(rows), {})[name] = way.per_token() if way.measured else None
        return found

    def _way(self, rows: int, evicts: bool) -> _Way:
        return self._ways.setdefault((_size(rows), evicts), _Way())


def _size(rows: int) -> int:
    """Rows that are weighed as one: four sizes for each doubling beyond the first few hundred."""
    if rows <= 512:
        return rows
    step = 1 << (rows.bit_length() - 3)
    return -(-rows // step) * step
