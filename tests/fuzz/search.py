"""A search for wrong cases: rounds of generated ones until the time is up, failures shrunk."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.architecture import Architecture
from tests.fuzz.case import Case, cases, reproduction
from tests.fuzz.judge import Verdict, judge, kind_of

__all__ = ["Found", "Search"]

CASES_A_ROUND = 10
"""Few, since the later cases of a round resemble the earlier ones."""
SHRINKING_SECONDS = 240.0
FEATURES = ("attention", "position", "norm_place", "qkv", "mlp", "moe", "window", "product")
"""Fields whose values are counted, to show what was generated."""


class _Interesting(AssertionError):
    """Tells Hypothesis which cases to shrink."""


@dataclass
class Found:
    """A wrong case, as small as it could be made."""

    case: Case
    detail: str
    seed: int
    """Of the round that found it."""
    seen: int = 1
    """Cases that were wrong in this way."""

    @property
    def name(self) -> str:
        """The same for the same case."""
        words = "_".join(kind_of(self.detail).split()[:4])
        clean = "".join(letter for letter in words.lower() if letter.isalnum() or letter == "_")
        return f"{clean}_{hashlib.sha1(self.case.to_json().encode()).hexdigest()[:8]}"

    def write(self, folder: Path) -> Path:
        """The case as JSON, for the corpus."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.name}.json"
        file.write_text(self.case.to_json() + "\n", encoding="utf-8")
        return file


@dataclass
class Search:
    """Counts of what was judged, and the wrong cases."""

    device: str = "cpu"
    lowering: str = "eager"
    seeds: list[int] = field(default_factory=list)
    cases: int = 0
    totals: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    coverage: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    features: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[Found] = field(default_factory=list)

    def run(self, first_seed: int, seconds: float, report: Callable[[Search], None]) -> None:
        """Rounds of seeds from `first_seed` on; `report` is called after each."""
        end = time.monotonic() + seconds
        number = first_seed
        while time.monotonic() < end:
            self.round(number, CASES_A_ROUND)
            report(self)
            number += 1

    def round(self, number: int, count: int) -> None:
        """`count` cases of one seed. One that is wrong in a new way is shrunk, which ends it."""
        self.seeds.append(number)
        shrinking = _Shrinking(self)

        @seed(number)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )
        @given(cases())
        def search(case: Case) -> None:
            shrinking.judge(case)

        try:
            search()
        except _Interesting:
            assert shrinking.smallest is not None
            case, verdict = shrinking.smallest
            self.wrong.append(Found(case, verdict.detail, number))

    def count(self, case: Case, verdict: Verdict) -> None:
        self.cases += 1
        self.outcomes[verdict.outcome] += 1
        if verdict.outcome != "wrong":
            self.coverage[verdict.coverage] += 1
        for name in ("trajectories", "calls", "steps", "unclear"):
            self.totals[name] += getattr(verdict, name)
        for reason in verdict.reasons:
            self.refusals[kind_of(reason)] += 1
        for name in FEATURES:
            value = str(getattr(case.architecture, name))
            self.features.setdefault(name, Counter())[value] += 1

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON types."""
        return {
            "device": self.device,
            "lowering": self.lowering,
            "seeds": [min(self.seeds), max(self.seeds)] if self.seeds else [],
            "cases": self.cases,
            **{name: self.totals[name] for name in ("trajectories", "calls", "steps", "unclear")},
            "outcomes": {name: self.outcomes[name] for name in ("equal", "refused", "wrong")},
            "coverage": {name: self.coverage[name] for name in ("plan", "partial", "refused")},
            "refusals": dict(self.refusals.most_common()),
            "features": {
                name: dict(counts.most_common()) for name, counts in self.features.items()
            },
            "wrong": [
                {
                    "name": found.name,
                    "detail": found.detail,
                    "seed": found.seed,
                    "seen": found.seen,
                    "case": found.case.to_dict(),
                    "script": reproduction(found.case, self.device, self.lowering),
                }
                for found in self.wrong
            ],
        }


@dataclass
class _Shrinking:
    """What one round is after: the first failure of a kind that is not known yet.

    Judging is timed and not repeated: when the time to shrink is up, cases that were not judged
    before pass, so that Hypothesis is left with the smallest that failed.
    """

    search: Search
    kind: str = ""
    until: float = 0.0
    known: dict[str, bool] = field(default_factory=dict)
    smallest: tuple[Case, Verdict] | None = None

    def judge(self, case: Case) -> None:
        key = case.to_json()
        if key not in self.known:
            self.known[key] = self._fails(case)
        if self.known[key]:
            raise _Interesting(self.kind)

    def _fails(self, case: Case) -> bool:
        shrinks = bool(self.kind)
        if shrinks and time.monotonic() > self.until:
            return False
        verdict = judge(case, self.search.device, self.search.lowering)
        if not shrinks:
            self.search.count(case, verdict)
        if verdict.outcome != "wrong":
            return False
        kind = kind_of(verdict.detail)
        if not shrinks and self._is_known(kind):
            return False
        if not shrinks:
            self.kind, self.until = kind, time.monotonic() + SHRINKING_SECONDS
        if kind != self.kind:
            return False
        self.smallest = _smaller(self.smallest, (case, verdict))
        return True

    def _is_known(self, kind: str) -> bool:
        """Whether that was found before: it is counted, not shrunk again."""
        for found in self.search.wrong:
            if kind_of(found.detail) == kind:
                found.seen += 1
                return True
        return False


def _smaller(old: tuple[Case, Verdict] | None, new: tuple[Case, Verdict]) -> tuple[Case, Verdict]:
    return new if old is None or _size(new[0]) < _size(old[0]) else old


def _size(case: Case) -> tuple[int, ...]:
    """Fields that are not the default, then calls, tokens and layers."""
    defaults = dataclasses.asdict(Architecture())
    fields = dataclasses.asdict(case.architecture)
    changed = sum(fields[name] != value for name, value in defaults.items())
    calls = sum(1 + len(spec.counts) for spec in case.trajectories)
    tokens = sum(spec.length * len(spec.prompts) for spec in case.trajectories)
    return changed, calls, tokens, case.architecture.layers
