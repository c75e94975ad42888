"""What differs between two records: the first difference, and how many there are of each kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from focus_compile.records.document import Record

__all__ = ["Comparison", "Difference", "compare"]

_DECISIONS = ("rows", "focus", "kept", "blocks", "sinks", "token")
_NEW = "new trajectory"
_SHOWN = 160
"""Characters of a value in a message."""


@dataclass(frozen=True, slots=True)
class Difference:
    """call: its number, None for what is of the whole run. path: where in `what` the values left
    and right, shortened, part first."""

    call: int | None
    what: str
    left: str
    right: str
    path: str = ""

    def __str__(self) -> str:
        where = "the run" if self.call is None else f"call {self.call}"
        return f"{where}: {self.what}{self.path}: {self.left} against {self.right}"


@dataclass(frozen=True)
class Comparison:
    """differences: in the order of calls; context: settings, versions and options that differ,
    which are no differences of the run; seconds: in calls of each record, compilation left out."""

    differences: tuple[Difference, ...]
    context: tuple[Difference, ...]
    calls: tuple[int, int]
    seconds: tuple[float, float]

    @property
    def same(self) -> bool:
        return not self.differences

    @property
    def first(self) -> Difference | None:
        """The first difference."""
        return self.differences[0] if self.differences else None

    def counts(self) -> dict[str, int]:
        """Calls that differ, by what differs."""
        return dict(Counter(found.what for found in self.differences))

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "same": self.same,
            "first": None if self.first is None else asdict(self.first),
            "counts": self.counts(),
            "context": [asdict(found) for found in self.context],
            "calls": list(self.calls),
            "seconds": list(self.seconds),
        }


def compare(left: Record, right: Record, *, tolerance: float | None = None) -> Comparison:
    """Compare two runs, call by call.

    tolerance: None compares logits bit by bit; a number compares the confidence of undecided
    positions instead, which may then differ by as much: for other machines, threads or versions.
    """
    found = list(_of_runs(left, right))
    for at, (a, b) in enumerate(zip(left.calls, right.calls, strict=False)):
        found += _of_calls(at, a, b, tolerance, left.tensors, right.tensors)
    if len(left.calls) != len(right.calls):
        at = min(len(left.calls), len(right.calls))
        found.append(Difference(at, "calls", f"{len(left.calls)}", f"{len(right.calls)}"))
    outputs = [(record.output or {}).get("ids") for record in (left, right)]
    if None not in outputs and outputs[0] != outputs[1]:
        found.append(_difference(None, "output", outputs[0], outputs[1]))
    return Comparison(
        tuple(found),
        tuple(_context(left, right)),
        (len(left.calls), len(right.calls)),
        (_seconds(left), _seconds(right)),
    )


def _of_runs(left: Record, right: Record) -> list[Difference]:
    weights = [record.model.get("weights") for record in (left, right)]
    if None in weights or weights[0] == weights[1]:
        return []
    return [_difference(None, "weights", weights[0], weights[1])]


def _of_calls(
    at: int,
    left: dict[str, Any],
    right: dict[str, Any],
    tolerance: float | None,
    *tensors: dict[str, Tensor],
) -> list[Difference]:
    pairs: list[tuple[str, Any, Any]] = [
        (name, left.get(name), right.get(name)) for name in ("submitted", "ids", "inputs")
    ]
    steps = left["step"], right["step"]
    for name in ("program", "why", "bucket", "keys"):
        pairs.append((name, *(_step(step, name) for step in steps)))
    for name in _DECISIONS:
        if name in left and name in right:
            pairs.append((name, left[name], right[name]))
    found = [_difference(at, name, a, b) for name, a, b in pairs if a != b]
    if tolerance is None:
        if left["logits"] != right["logits"]:
            found.append(_logits(at, left, right, *tensors))
    else:
        apart = _apart(left.get("confidence"), right.get("confidence"))
        if apart is not None and not apart <= tolerance:
            what = f"{apart:.3g} apart"
            found.append(Difference(at, "confidence", what, f"at most {tolerance:g}"))
    return found


def _step(step: dict[str, Any], name: str) -> Any:
    """What is compared of a step's record: why a trajectory is new depends on what was before."""
    value = step.get(name)
    return _NEW if name == "why" and str(value).startswith(_NEW) else value


def _apart(left: list[float] | None, right: list[float] | None) -> float | None:
    """The largest difference of two confidences; None where it is not known."""
    if not left or not right or len(left) != len(right):
        return None
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def _logits(at: int, left: dict[str, Any], right: dict[str, Any], *tensors: Any) -> Difference:
    apart = _apart(left.get("confidence"), right.get("confidence"))
    more = "" if apart is None else f" (confidence at most {apart:.2g} apart)"
    mine, theirs = (
        kept.get(call.get("values")) for kept, call in zip(tensors, (left, right), strict=True)
    )
    if mine is not None and theirs is not None and mine.shape == theirs.shape:
        largest = torch.nan_to_num(mine.double() - theirs.double()).abs().max()
        more = f" (logits at most {float(largest):.2g} apart)"
    a, b = (str(call["logits"])[:12] for call in (left, right))
    return Difference(at, "logits", a, b + more)


def _difference(at: int | None, what: str, left: Any, right: Any, path: str = "") -> Difference:
    """The first place where two values part."""
    pairs: list[tuple[Any, Any, Any]] = []
    if isinstance(left, dict) and isinstance(right, dict):
        pairs = [(name, left.get(name), right.get(name)) for name in {**left, **right}]
    elif isinstance(left, list) and isinstance(right, list):
        pairs = [(place, a, b) for place, (a, b) in enumerate(zip(left, right, strict=False))]
    for place, a, b in pairs:
        if a != b:
            return _difference(at, what, a, b, f"{path}[{place}]")
    return Difference(at, what, _short(left), _short(right), path)


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _context(left: Record, right: Record) -> list[Difference]:
    found = []
    for what in ("made", "settings"):
        a, b = getattr(left, what), getattr(right, what)
        names = [name for name in dict.fromkeys((*a, *b)) if name != "peak_bytes"]
        found += [(name, a.get(name), b.get(name)) for name in names]
    for at, (one, other) in enumerate(zip(left.graphs, right.graphs, strict=False)):
        a, b = one["options"], other["options"]
        graph = f" of graph {at}" if at else ""
        found += [(f"option {name}{graph}", a.get(name), b.get(name)) for name in {**a, **b}]
    return [Difference(None, name, _short(a), _short(b)) for name, a, b in found if a != b]


def _seconds(record: Record) -> float:
    """In calls, without compilation."""
    steps = [call["step"] for call in record.calls]
    return sum(step["milliseconds"] / 1e3 - step["compile_seconds"] for step in steps)
