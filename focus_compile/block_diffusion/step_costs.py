"""Whether eviction pays: how much shorter a step is with it, against how many tokens fewer it
decodes, as measured."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

__all__ = ["StepCosts"]

WARM_UP = 2
"""Steps of a size that compile, load and capture."""
TRIALS = 3
"""Steps after those that are measured before a choice is made."""
REMEMBERED = 16
"""Times of a size that count."""
YIELDS = 256
"""Steps whose yields count, of all sizes: they scatter far more than times do."""
WORTH = 0.95
"""Share of a whole step's time that an evicting one may take at most. It decodes no more than a
whole one ever, and a loss of a few percent only shows after many steps."""
RETRY = 128
"""Choices after which the other way is measured once more."""


@dataclass
class _Way:
    seen: int = 0
    milliseconds: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))


@dataclass
class StepCosts:
    """Steps by their padded number of listed rows, evicting (True) and whole (False); large numbers
    that are close to one another are one."""

    _ways: dict[tuple[int, bool], _Way] = field(default_factory=dict)
    _chosen: dict[int, int] = field(default_factory=dict)
    _yields: dict[bool, deque[tuple[int, int]]] = field(
        default_factory=lambda: {way: deque(maxlen=YIELDS) for way in (False, True)}
    )

    def evict(self, rows: int) -> bool:
        """Whether a step of so many rows had better evict."""
        whole, evicting = self._way(rows, False), self._way(rows, True)
        for way, evicts in ((whole, False), (evicting, True)):
            if way.seen < WARM_UP + TRIALS:
                return evicts
        size = _size(rows)
        choices = self._chosen[size] = self._chosen.get(size, 0) + 1
        took = statistics.median(evicting.milliseconds) / statistics.median(whole.milliseconds)
        pays = took < min(WORTH, self.share_decoded)
        return pays if choices % RETRY else not pays

    @property
    def share_decoded(self) -> float:
        """Tokens that an evicting step decodes of a sequence, over those of a whole step."""
        whole, evicting = (self._mean_yield(evicts) for evicts in (False, True))
        return evicting / whole if whole else 1.0

    def measured(
        self, rows: int, evicts: bool, milliseconds: float, decoded: int, sequences: int
    ) -> None:
        """A step took so long, with the read of its results, and decoded so many tokens of so many
        sequences."""
        way = self._way(rows, evicts)
        way.seen += 1
        if way.seen > WARM_UP:
            way.milliseconds.append(milliseconds)
        self._yields[evicts].append((decoded, sequences))

    def to_dict(self) -> dict[str, dict[str, float | None]]:
        """Milliseconds of a step by rows, and tokens decoded of a sequence, as JSON types."""
        found: dict[str, dict[str, float | None]] = {}
        for (rows, evicts), way in sorted(self._ways.items()):
            measured = statistics.median(way.milliseconds) if way.milliseconds else None
            found.setdefault(str(rows), {})[_NAMES[evicts]] = measured
        found["decoded"] = {name: self._mean_yield(evicts) for evicts, name in _NAMES.items()}
        return found

    def _mean_yield(self, evicts: bool) -> float:
        steps = self._yields[evicts]
        return sum(decoded for decoded, _ in steps) / max(1, sum(count for _, count in steps))

    def _way(self, rows: int, evicts: bool) -> _Way:
        return self._ways.setdefault((_size(rows), evicts), _Way())


_NAMES = {False: "whole", True: "evicting"}


def _size(rows: int) -> int:
    """Rows that are weighed as one: four sizes for each doubling beyond the first few hundred."""
    if rows <= 512:
        return rows
    step = 1 << (rows.bit_length() - 3)
    return -(-rows // step) * step
