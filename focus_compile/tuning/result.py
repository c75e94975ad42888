"""What a search found, and the settings file that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from focus_compile.tuning.judge import Score

__all__ = ["Trial", "TuneResult", "pareto_front"]

_ABOUT_RUNNING = ("lowering", "strict", "dryrun")
"""Options that say how programs run here, and nothing of answers."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting. score: on the searched prompts, those that it was asked; checked: on the ones
    held out, where it was asked these."""

    number: int
    options: dict[str, Any]
    score: Score
    complete: bool
    """Whether all searched prompts were asked, and not only enough to rule it out."""
    checked: Score | None = None

    @property
    def agreement(self) -> float:
        """The lower of the searched and the held-out prompts' agreement."""
        known = [self.score.agreement]
        if self.checked is not None:
            known.append(self.checked.agreement)
        return min(known)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        checked = self.checked
        return {
            "number": self.number,
            "options": self.options,
            "complete": self.complete,
            "prompts": len(self.score.costs),
            "agreement": self.score.agreement,
            "tokens_same": self.score.same,
            "tokens_compared": self.score.compared,
            "cost": self.score.cost,
            "speedup": 1 / self.score.cost,
            "held_out_agreement": None if checked is None else checked.agreement,
            "held_out_cost": None if checked is None else checked.cost,
        }


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """The complete trials that no other is both cheaper than and as faithful as, cheapest first."""
    front: list[Trial] = []
    done = (trial for trial in trials if trial.complete)
    for trial in sorted(done, key=lambda t: (t.score.cost, -t.score.agreement)):
        if not front or trial.score.agreement > front[-1].score.agreement:
            front.append(trial)
    return front


@dataclass(frozen=True, slots=True)
class TuneResult:
    """All trials, and the one that was chosen.

    reached: whether the chosen one has the target's agreement, on the searched and on the held-out
    prompts; otherwise it is the one that agrees best. importance: of "agreement" and of "cost", the
    share of its variance that each option explains.
    """

    trials: tuple[Trial, ...]
    chosen: Trial
    reached: bool
    target: float
    measure: str
    importance: dict[str, dict[str, float]]
    fixed: dict[str, Any]
    """Options that were not searched."""
    model: dict[str, Any]
    measured: dict[str, Any]
    """How, on what, and with which versions."""

    @property
    def options(self) -> dict[str, Any]:
        """What the settings file sets."""
        fixed = {name: value for name, value in self.fixed.items() if name not in _ABOUT_RUNNING}
        return fixed | self.chosen.options

    def to_dict(self) -> dict[str, Any]:
        """The settings file, as JSON types."""
        chosen = self.chosen.to_dict()
        return {
            "options": self.options,
            "model": self.model,
            "focus_compile": self.measured["focus_compile"],
            "torch": self.measured["torch"],
            "target_agreement": self.target,
            "reached": self.reached,
            "measure": self.measure,
            "chosen": chosen,
            "pareto_front": [trial.number for trial in pareto_front(self.trials)],
            "importance": self.importance,
            "trials": [trial.to_dict() for trial in self.trials],
            "measured": self.measured,
        }
