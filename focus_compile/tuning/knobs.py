"""What the tuner may change, and between which values."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from focus_compile.config import FocusConfig

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

__all__ = ["KNOBS", "Knobs"]

KNOBS = (
    "keep_ratio",
    "expansion",
    "window",
    "dense_layers",
    "sink_tokens",
    "key_block",
    "block_summary",
    "list_reuse",
    "refresh",
    "tolerance",
    "refresh_rows",
)
"""Options of FocusConfig that are searched; the last two where refresh is "adaptive"."""
MOST_EXPANSION, MOST_WINDOW = 8, 16
KEY_BLOCKS = (8, 16, 32, 64)
LIST_REUSE = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Knobs:
    """The space that is searched.

    layers: attention sites of the model. fixed: names that are not searched. calls_per_block: model
    calls of a decode block, where it is known; blocks: of a response.
    """

    layers: int
    fixed: Collection[str]
    calls_per_block: int | None
    blocks: int

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """The options of one trial."""
        options = {
            "keep_ratio": lambda name: round(trial.suggest_float(name, 0.05, 1.0, step=0.05), 2),
            "expansion": lambda name: trial.suggest_int(name, 1, MOST_EXPANSION),
            "window": lambda name: trial.suggest_int(name, 1, MOST_WINDOW),
            "dense_layers": lambda name: trial.suggest_int(name, 0, max(0, self.layers - 1)),
            "sink_tokens": lambda name: trial.suggest_int(name, 0, 32, step=4),
            "key_block": lambda name: trial.suggest_categorical(name, KEY_BLOCKS),
            "block_summary": lambda name: trial.suggest_categorical(name, ("bound", "mean")),
            "list_reuse": lambda name: trial.suggest_categorical(name, LIST_REUSE),
            "refresh": lambda name: trial.suggest_categorical(name, self.schedules),
        }
        found = {name: ask(name) for name, ask in options.items() if name not in self.fixed}
        if found.get("refresh") == "adaptive":
            found |= self._adaptive(trial)
        return found

    def _adaptive(self, trial: BaseTrial) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if "tolerance" not in self.fixed:
            found["tolerance"] = float(
                f"{trial.suggest_float('tolerance', 0.02, 1.0, log=True):.2g}"
            )
        if "refresh_rows" not in self.fixed:
            share = trial.suggest_float("refresh_rows", 0.0, 0.3, step=0.05)
            found["refresh_rows"] = round(share, 2)
        return found

    @property
    def schedules(self) -> tuple[str | int, ...]:
        """Values of `refresh`: the words, and every second and fourth block where blocks have a
        known number of calls."""
        if self.calls_per_block is None:
            return ("block", "adaptive")
        periods = (2, 4) if self.blocks > 2 else (2,) if self.blocks == 2 else ()
        return ("block", "adaptive", *(count * self.calls_per_block for count in periods))

    def first(self) -> list[dict[str, Any]]:
        """What the search starts from: the defaults, which are the paper's, and all keys with the
        most rows, which is nearest to dense."""
        known = FocusConfig()
        defaults = {
            "keep_ratio": known.keep_ratio,
            "expansion": known.expansion,
            "window": known.window,
            "dense_layers": min(known.dense_layers_for(self.layers), max(0, self.layers - 1)),
            "sink_tokens": known.sink_tokens,
            "key_block": known.key_block,
            "block_summary": known.block_summary,
            "list_reuse": known.list_reuse,
            "refresh": known.refresh,
        }
        careful = {"keep_ratio": 1.0, "expansion": MOST_EXPANSION, "window": MOST_WINDOW}
        return [
            {name: value for name, value in options.items() if name not in self.fixed}
            for options in (defaults, defaults | careful)
        ]
