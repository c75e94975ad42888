"""What the project set out to reach, held against what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.suite.cellbook import CellBook, Entry
from benchmarks.suite.cells import BEYOND

__all__ = ["Verdict", "verdicts"]

STEP_OVER_FLOOR = {"llada": 1.3, "dream": 1.5}
OVER_VANILLA = {  # at 32K, one token a call: (block, arm) to times, on an H200 and on an H100
    ("h200", 64, "b"): 45,
    ("h200", 64, "a"): 48,
    ("h100", 64, "b"): 42,
    ("h100", 64, "a"): 45,
    ("h200", 32, "b"): 26,
    ("h200", 32, "a"): 28,
    ("h100", 32, "b"): 26,
    ("h100", 32, "a"): 28,
}
PARTIAL_OVER = {"a": 100, "b": 65, "c": 3, "d": 1.5}
"""Of (h) and (i) at 32K, blocks of 32, one token a call."""
OVER_FAST_DLLM = 2.05
REFRESH_OVER_VANILLA = 1.03
LONG = 32768


@dataclass(frozen=True)
class Verdict:
    """One aim on one cell, or on the worst of many."""

    device: str
    aim: str
    got: str
    reached: bool


def verdicts(book: CellBook) -> list[Verdict]:
    """Every aim that the rows can answer, on the GPUs that it was set for."""
    found = []
    for device, model, entries in book.parts():
        short = next((name for name in ("h200", "h100") if name.upper() in device), None)
        if short is None or model not in STEP_OVER_FLOOR:
            continue
        found += _steps(device, model, entries)
        found += _refreshes(device, model, entries)
        if model == "llada":
            found += _long(device, short, entries)
            found += _partial(device, entries)
        found += _never_slower(device, model, entries)
        found += _recompilations(device, model, entries)
    return found


def _worst(
    device: str,
    entries: list[Entry],
    value: Callable[[Entry], float | None],
    limit: float,
    aim: str,
) -> list[Verdict]:
    """Largest value over the cells against an upper limit."""
    values = [(v, e) for e in entries if (v := value(e)) is not None]
    if not values:
        return []
    worst, where = max(values, key=lambda pair: pair[0])
    got = f"{worst:.3g} at worst ({where.title}); {sum(v <= limit for v, _ in values)} of "
    return [Verdict(device, aim, got + f"{len(values)} cells reach it", worst <= limit)]


def _steps(device: str, model: str, entries: list[Entry]) -> list[Verdict]:
    def over_floor(entry: Entry) -> float | None:
        row = entry.arm("g")
        if row is None or not row.get("bytes_floor_ms") or row["rows"] > 128:
            return None
        if not 8192 <= entry.context <= LONG:
            return None
        return row["step_ms"] / row["bytes_floor_ms"]

    limit = STEP_OVER_FLOOR[model]
    aim = f"{model}: a step takes at most {limit} of its bytes floor, 8K to 32K"
    return _worst(device, entries, over_floor, limit, aim)


def _refreshes(device: str, model: str, entries: list[Entry]) -> list[Verdict]:
    def over_vanilla(entry: Entry) -> float | None:
        ours, vanilla = entry.arm("g"), entry.arm("b")
        if ours is None or vanilla is None or ours["run"] != vanilla["run"]:
            return None
        return ours["refresh_ms"] / vanilla["step_ms"]

    aim = f"{model}: a refresh takes at most {REFRESH_OVER_VANILLA} of (b)'s forward"
    return _worst(device, entries, over_vanilla, REFRESH_OVER_VANILLA, aim)


def _long(device: str, short: str, entries: list[Entry]) -> list[Verdict]:
    found = []
    largest = max(entry.alpha for entry in entries)
    for entry in entries:
        if entry.context != LONG or entry.per_step != 1 or entry.alpha != largest:
            continue
        limits: dict[str, float | None] = {
            arm: OVER_VANILLA.get((short, entry.block, arm)) for arm in "ba"
        }
        if entry.block == 64:
            limits["c"] = OVER_FAST_DLLM
        for arm, limit in limits.items():
            ratio = entry.ratio(arm)
            if ratio is not None and limit is not None:
                aim = f"{entry.title}: at least {limit} times as fast as ({arm})"
                found.append(Verdict(device, aim, f"{ratio:.3g}", ratio >= limit))
    return found


def _partial(device: str, entries: list[Entry]) -> list[Verdict]:
    return [
        Verdict(
            device,
            f"({ours}), {entry.title}: at least {limit} times as fast as ({arm})",
            f"{ratio:.3g}",
            ratio >= limit,
        )
        for entry in entries
        if (entry.context, entry.block, entry.per_step) == (LONG, 32, 1)
        for ours in BEYOND
        for arm, limit in PARTIAL_OVER.items()
        if (ratio := entry.ratio(arm, ours)) is not None
    ]


def _never_slower(device: str, model: str, entries: list[Entry]) -> list[Verdict]:
    def slower(entry: Entry) -> float | None:
        ratio = entry.ratio("d")
        return None if ratio is None else 1 / ratio

    return _worst(device, entries, slower, 1.0, f"{model}: never slower than (d)")


def _recompilations(device: str, model: str, entries: list[Entry]) -> list[Verdict]:
    rows = [row for e in entries if (row := e.arm("g")) is not None]
    if not rows:
        return []
    count = sum(row["recompilations"] + (row["compile_in_calls_s"] > 0) for row in rows)
    aim = f"{model}: no compilation after warm-up"
    return [Verdict(device, aim, f"{count} in {len(rows)} cells", count == 0)]
