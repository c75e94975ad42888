"""Every failure a user can meet, one class each: what happened, where, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CompileError",
    "FocusError",
    "OptionError",
    "PassError",
    "RanksError",
    "RecordError",
    "RefusalError",
    "SelfCheckError",
]


class FocusError(Exception):
    """Base of every error that focus_compile raises on purpose."""


class OptionError(FocusError, ValueError):
    """An option is unknown, of the wrong type, or out of range."""

    @classmethod
    def unknown(
        cls, name: str, known: Iterable[str], *, kind: str = "option", prefix: str = ""
    ) -> OptionError:
        """Names the closest known spelling, or lists them all. prefix: before every name."""
        known = sorted(known)
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        known = [prefix + spelling for spelling in known]
        hint = f"did you mean {prefix + close[0]!r}?" if close else f"known: {', '.join(known)}."
        return cls(f"focus_compile: unknown {kind} {prefix + name!r}; {hint}")

    @classmethod
    def invalid(cls, name: str, value: object, expected: str) -> OptionError:
        return cls(f"focus_compile: option {name}={value!r} is not valid; expected {expected}.")


class RecordError(FocusError, ValueError):
    """A file is no record of a run, or one that cannot be replayed or drawn."""


class RefusalError(FocusError, RuntimeError):
    """`strict=True` and the exact program would have run where an incremental one was asked for."""


class CompileError(FocusError, RuntimeError):
    """Inductor failed on a program other than the model itself."""


class SelfCheckError(FocusError, RuntimeError):
    """The first run of a plan disagreed with the model's own forward."""


class RanksError(FocusError, RuntimeError):
    """The ranks of a model that is split over processes cannot go on together."""


class PassError(FocusError, RuntimeError):
    """A graph pass left an invalid graph behind: a bug of ours, with the stage that shows it."""
