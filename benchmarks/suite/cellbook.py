"""Rows of results by cell, and ratios between arms that ran together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CellBook", "Entry"]

CELL = ("device", "model", "context", "block", "per_step", "alpha")
Row = dict[str, Any]


@dataclass
class Entry:
    """One cell: rows by run and arm, runs in order of time."""

    device: str
    model: str
    context: int
    block: int
    per_step: int
    alpha: float
    runs: dict[str, dict[str, Row]] = field(default_factory=dict)

    def arm(self, letter: str, ours: str = "g") -> Row | None:
        """The newest row of an arm, beside (g) of the same run where there is one."""
        for _, arms in sorted(self.runs.items(), reverse=True):
            if letter in arms and ours in arms:
                return arms[letter]
        alone = [arms[letter] for _, arms in sorted(self.runs.items()) if letter in arms]
        return alone[-1] if alone else None

    def ratio(self, letter: str, ours: str = "g") -> float | None:
        """How many times faster (g), or `ours`, is than an arm of the same run; None if none has
        both."""
        for _, arms in sorted(self.runs.items(), reverse=True):
            if letter in arms and ours in arms and arms[ours]["total_s"]:
                return arms[letter]["total_s"] / arms[ours]["total_s"]
        return None

    def one_token_ratio(self, letter: str, generated: int) -> float | None:
        """The same against vanilla at one token a call, whatever the cell's tokens per call."""
        row, ratio = self.arm(letter), self.ratio(letter)
        return None if row is None or ratio is None else ratio * generated / row["calls"]

    @property
    def title(self) -> str:
        return (
            f"{self.model} {self.context:,} tokens, block {self.block}, {self.per_step} a call, "
            f"α={self.alpha:g}"
        )


@dataclass
class CellBook:
    """All cells that have a time."""

    entries: list[Entry]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> CellBook:
        found: dict[tuple[Any, ...], Entry] = {}
        for row in rows:
            if row.get("error") or not row.get("total_s"):
                continue
            cell = tuple(row[name] for name in CELL)
            entry = found.setdefault(cell, Entry(*cell))
            entry.runs.setdefault(row["run"], {})[row["arm"]] = row
        return cls([found[cell] for cell in sorted(found)])

    def parts(self) -> list[tuple[str, str, list[Entry]]]:
        """(device, model, its cells)."""
        names = list(dict.fromkeys((e.device, e.model) for e in self.entries))
        return [
            (device, model, [e for e in self.entries if (e.device, e.model) == (device, model)])
            for device, model in names
        ]

    def losing(self) -> list[tuple[Entry, str, float]]:
        """Cells where an arm is faster than (g): (cell, arm, times faster)."""
        return [
            (entry, letter, 1 / ratio)
            for entry in self.entries
            for letter in "abcdef"
            if (ratio := entry.ratio(letter)) is not None and ratio < 1
        ]


def headline(entries: list[Entry]) -> list[Entry]:
    """One cell a context and block: fewest tokens a call, largest alpha."""
    chosen: dict[tuple[int, int], Entry] = {}
    for entry in sorted(entries, key=lambda e: (e.per_step, -e.alpha)):
        chosen.setdefault((entry.context, entry.block), entry)
    return [chosen[at] for at in sorted(chosen)]
